-- One beat of one server: note its count, prolong its lease, drop those whose lease is over, tell the total.
-- KEYS, all in one slot: members (hash: id -> "count stamp incarnation"); leases (sorted set: id -> the moment of the
-- lease clock at which it is over); state (hash: total, clock, lost_at, beat_at, recount_at). All times are milliseconds.
-- ARGV: id; incarnation; stamp, growing with each beat; count, or "leave"; TTL; beat interval; the incarnation that this
-- one may replace, or ""; the stamp of the last beat that was answered; the lease clock as it was told then.
-- Returns: total; servers; those that have beaten since data was last lost; whether this one was missing; the lease clock;
-- when on it that loss was; who holds the id; until when.
-- The lease clock runs while anybody beats: each beat moves it on by the time since the one before, but by one interval at
-- most. So neither an outage, however long, nor a jump of Redis' clock makes those look dead who could not beat.
local members, leases, state = KEYS[1], KEYS[2], KEYS[3]
local id, incarnation, stamp, count, ttl, interval, replaced, answered, known = unpack(ARGV)
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local size, leased, entry = redis.pcall('HLEN', members), redis.pcall('ZCARD', leases), redis.pcall('HGET', members, id)
local kept = redis.pcall('HMGET', state, 'total', 'clock', 'lost_at', 'beat_at', 'recount_at')
local total, clock, lost_at = tonumber(kept[1]) or -1, tonumber(kept[2]) or -1, tonumber(kept[3]) or 0
local before, last_stamp, holder = string.match(type(entry) == 'string' and entry or '', '^(%d+) (%d+) (%S+)$')
-- Keys that are somebody else's, of which one was evicted, or that are older than what this server was told last (out of
-- a backup, or of a replica that lagged) are as good as none. All beat again; the clock goes on from where it was.
local function sane(number) return number >= 0 and number < 1e15 end
local is_sane = size == leased and (holder or not entry) and sane(total) and sane(clock) and sane(lost_at)
local pause = now - (tonumber(kept[4]) or now)
local is_older = math.min(known - clock, pause) > 2 * interval or (holder == incarnation and answered - last_stamp > 0)
if kept.err or not is_sane or is_older then
  if size ~= 0 or leased ~= 0 or kept.err or kept[2] then redis.call('DEL', members, leases, state) end
  size, kept, pause, before, holder, clock, lost_at = 0, {}, 0, nil, nil, known + 1, known + 1
end
total, clock = size > 0 and total or 0, clock + math.max(0, math.min(pause, interval))

local function drop(ids)
  for _, value in ipairs(redis.call('HMGET', members, unpack(ids))) do total = total - (string.match(value or '', '^%d+') or 0) end
  redis.call('HDEL', members, unpack(ids))
  redis.call('ZREM', leases, unpack(ids))
end

local is_mine = holder == incarnation
-- A beat that was overtaken (on a connection given up while Redis was frozen) must not undo the later one.
local may_write = not holder or holder == replaced or (is_mine and stamp - last_stamp > 0)
if may_write and count == 'leave' then
  drop({id})
elseif may_write then
  total, holder = total + count - (before or 0), incarnation
  redis.call('HSET', members, id, count .. ' ' .. stamp .. ' ' .. incarnation)
  redis.call('ZADD', leases, clock + ttl, id)
end
local over = redis.call('ZRANGEBYSCORE', leases, '-inf', clock, 'LIMIT', 0, 500)
if #over > 0 then drop(over) end

local is_due = math.abs(now - (tonumber(kept[5]) or 0)) >= 60000
if is_due then
  total = 0
  for _, value in ipairs(redis.call('HVALS', members)) do total = total + (string.match(value, '^%d+') or 0) end
end
redis.call('HSET', state, 'total', total, 'clock', clock, 'lost_at', lost_at, 'beat_at', now, 'recount_at', is_due and now or kept[5])
for _, key in ipairs(is_due and KEYS or {}) do redis.call('EXPIRE', key, 86400) end
local servers, fresh = redis.call('ZCARD', leases), redis.call('ZCOUNT', leases, lost_at + ttl, '+inf')
return {total, servers, fresh, is_mine and 0 or 1, clock, lost_at, holder or '', tonumber(redis.call('ZSCORE', leases, id) or 0)}
