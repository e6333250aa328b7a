-- Who is in the cluster, for people to look at. It changes nothing, so a replica and a full Redis answer it too.
-- KEYS: as in heartbeat.lua. ARGV: the id of the server that asks; beat interval; how many servers to tell of at most.
-- Returns: servers; the lease clock as it is now, -1 if there is none; then id, lease and entry of each server told of:
-- the one that asks, then those whose leases are over first, which have been silent longest.
local members, leases, state = KEYS[1], KEYS[2], KEYS[3]
local own, interval, most = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local kept = redis.call('HMGET', state, 'clock', 'beat_at')
local clock, pause = tonumber(kept[1]) or -1, now - (tonumber(kept[2]) or now)
local told = {redis.call('ZCARD', leases), clock >= 0 and clock + math.max(0, math.min(pause, interval)) or -1}
local function tell(id, lease)
  -- Cut, since all of it may be somebody else's: an id has at most 128 characters, and an entry fewer.
  local entry = redis.call('HGET', members, id) or ''
  for _, value in ipairs({id, lease, entry}) do told[#told + 1] = string.sub(value, 1, 129) end
end
local lease = redis.call('ZSCORE', leases, own)
if lease then tell(own, lease) end
local listed = redis.call('ZRANGE', leases, 0, most - 1, 'WITHSCORES')
for at = 1, #listed, 2 do
  if listed[at] ~= own and #told < 2 + 3 * most then tell(listed[at], listed[at + 1]) end
end
return told
