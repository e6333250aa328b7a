-- One beat of one server: note its count, prolong its lease, drop those whose lease is over, tell the total.
-- KEYS, all in one slot: members (hash: id -> "count stamp incarnation"); leases (sorted set: id -> the moment of the
-- lease clock at which it is over); state (hash: total, clock, beat_at, recount_at). All times are milliseconds.
-- ARGV: id; incarnation; stamp, which grows with each of its beats; count, or "leave"; TTL; beat interval; the incarnation
-- that this one may take the place of, or ""; the lease clock as this server last knew it. Returns: total; servers; those
-- that have beaten in the last quarter of the TTL; whether this one was missing; the lease clock; who holds the id; until when.
-- The lease clock runs while anybody beats: each beat moves it on by the time since the one before, but by one interval at
-- most. So neither an outage, however long, nor a jump of Redis' clock makes those look dead who could not beat.
local members, leases, state = KEYS[1], KEYS[2], KEYS[3]
local id, incarnation, stamp, count, ttl, interval, replaced, known = unpack(ARGV)
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- Keys that are somebody else's, of which one was evicted, or out of an old backup are as good as none: all beat again.
local size, leased = redis.pcall('HLEN', members), redis.pcall('ZCARD', leases)
local kept = redis.pcall('HMGET', state, 'total', 'clock', 'beat_at', 'recount_at')
local total, clock, pause = tonumber(kept[1]), tonumber(kept[2]), now - (tonumber(kept[3]) or now)
local is_old = clock and known - clock >= tonumber(ttl) and pause >= tonumber(ttl)
if type(size) ~= 'number' or size ~= leased or kept.err or (size > 0 and not (total and clock)) or is_old then
  redis.call('DEL', members, leases, state)
  size, total, clock, pause, kept = 0, 0, 0, 0, {}
end
total, clock = size > 0 and total or 0, (clock or 0) + math.max(0, math.min(pause, tonumber(interval)))

local before, last_stamp, holder = string.match(redis.call('HGET', members, id) or '', '^(%d+) (%d+) (%S+)$')
local is_mine = holder == incarnation
-- A beat that was overtaken (on a connection given up while Redis was frozen) must not undo the later one.
if not holder or holder == replaced or (is_mine and tonumber(stamp) > tonumber(last_stamp)) then
  total = total - (before or 0)
  if count == 'leave' then
    redis.call('HDEL', members, id)
    redis.call('ZREM', leases, id)
  else
    total = total + count
    redis.call('HSET', members, id, count .. ' ' .. stamp .. ' ' .. incarnation)
    redis.call('ZADD', leases, clock + ttl, id)
    holder = incarnation
  end
end

local over = redis.call('ZRANGEBYSCORE', leases, '-inf', clock, 'LIMIT', 0, 500)
if #over > 0 then
  for _, value in ipairs(redis.call('HMGET', members, unpack(over))) do
    total = total - (string.match(value or '', '^%d+') or 0)
  end
  redis.call('HDEL', members, unpack(over))
  redis.call('ZREM', leases, unpack(over))
end

local recount_at = tonumber(kept[4]) or 0
local is_due = math.abs(now - recount_at) >= 60000
if is_due then
  total, recount_at = 0, now
  for _, value in ipairs(redis.call('HVALS', members)) do total = total + (string.match(value, '^%d+') or 0) end
end
redis.call('HSET', state, 'total', total, 'clock', clock, 'beat_at', now, 'recount_at', recount_at)
for _, key in ipairs(is_due and KEYS or {}) do redis.call('EXPIRE', key, 86400) end
local servers, fresh = redis.call('ZCARD', leases), redis.call('ZCOUNT', leases, clock + math.floor(ttl * 3 / 4), '+inf')
return {total, servers, fresh, is_mine and 0 or 1, clock, holder or '', tonumber(redis.call('ZSCORE', leases, id) or 0)}
