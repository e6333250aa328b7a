-- List the servers of the cluster, for people to read. It changes nothing, so a replica and a Redis
-- that is out of memory run it too.
--
-- KEYS: as in heartbeat.lua.
-- ARGV: id of the calling server; heartbeat interval in milliseconds; maximum number of servers.
-- Returns: number of servers; the lease clock at this moment, or -1 if it is unknown; the servers that
-- have gone, as heartbeat.lua keeps them; then the id, the end of the lease and the entry of each
-- listed server: the calling one first, then those whose leases end first, which have been silent for
-- longest.
local members, leases, state = KEYS[1], KEYS[2], KEYS[3]
local own_id, interval, max_servers = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local stored = redis.call('HMGET', state, 'clock', 'heartbeat_at', 'gone')
local clock, elapsed = tonumber(stored[1]) or -1, now - (tonumber(stored[2]) or now)
if clock >= 0 then clock = clock + math.max(0, math.min(elapsed, interval)) else clock = -1 end
local reply = {redis.call('ZCARD', leases), clock, string.sub(stored[3] or '', 1, 20000)}
local function add(id, lease_end)
  local entry = redis.call('HGET', members, id) or ''
  -- Cut to a length above that of any id or entry: the keys may hold values of other programs.
  for _, value in ipairs({id, lease_end, entry}) do
    reply[#reply + 1] = string.sub(value, 1, 200)
  end
end
local own_lease_end = redis.call('ZSCORE', leases, own_id)
if own_lease_end then add(own_id, own_lease_end) end
local listed = redis.call('ZRANGE', leases, 0, max_servers - 1, 'WITHSCORES')
for at = 1, #listed, 2 do
  if listed[at] ~= own_id and #reply < 3 + 3 * max_servers then add(listed[at], listed[at + 1]) end
end
return reply
