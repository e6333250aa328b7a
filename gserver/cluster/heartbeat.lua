-- One beat of one server: note its count, prolong its lease, drop those whose lease is over, tell the total.
-- KEYS, all in one slot: members (hash: id -> "count stamp incarnation"); leases (sorted set: id -> the moment of the
-- lease clock at which it is over); state (hash: total, clock, lost_at, back, beat_at, recount_at). Times are milliseconds.
-- ARGV: id; incarnation; stamp, growing with each beat; count, or "leave"; TTL; beat interval; the incarnation that this
-- one may replace, or ""; the stamp of the last beat that was answered; the lease clock as it was told then; the stamp of
-- the last beat before this one that was carried out or may have been.
-- Returns: total; servers; how many of those that were members when data was last lost are back; the lease clock; when
-- on it that loss was; who holds the id; until when; 1 if this server was there no more when it came, else 0.
-- The lease clock runs while anybody beats: each beat moves it on by the time since the one before, by one interval at
-- most. So neither an outage, however long, nor a jump of Redis' clock makes those look dead who could not beat.
local members, leases, state = KEYS[1], KEYS[2], KEYS[3]
local id, incarnation, stamp, count, ttl, interval, replaced, answered, known, sent = unpack(ARGV)
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function sane(value) return value and value >= 0 and value < 1e15 end
local function number(value) return tonumber(string.match(value or '', '^%d+') or 0) end
known = sane(tonumber(known)) and tonumber(known) or 0
local size, leased, entry = redis.pcall('HLEN', members), redis.pcall('ZCARD', leases), redis.pcall('HGET', members, id)
local kept = redis.pcall('HMGET', state, 'total', 'clock', 'lost_at', 'back', 'beat_at', 'recount_at')
local total, clock, lost_at, back = tonumber(kept[1]), tonumber(kept[2]), tonumber(kept[3]), tonumber(kept[4])
local before, last_stamp, holder = string.match(type(entry) == 'string' and entry or '', '^(%d+) (%d+) (%S+)$')
local pause = now - (tonumber(kept[5]) or now)
-- Keys that are somebody else's, of which one was evicted, or that are older than what this server was told last (out of
-- a backup, or of a replica that lagged) are as good as none. All beat again; the clock never goes back.
local is_sane = size == leased and (holder or not entry) and sane(total) and sane(clock) and sane(lost_at)
is_sane = is_sane and sane(back) and (size > 0 or total == 0)
local is_gone = not holder and answered - 0 > 0 and is_sane and known >= lost_at and clock - known - ttl < 0
local is_older = (is_gone and pause - interval > 0) or (is_sane and math.min(known - clock, pause) > 2 * interval)
if not is_sane or is_older or (holder == incarnation and answered - last_stamp > 0) then
  if size ~= 0 or leased ~= 0 or kept.err or kept[2] then redis.call('DEL', members, leases, state) end
  clock, lost_at = math.max(known + 1, now), math.max(known + 1, now)
  size, total, pause, back, before, holder = 0, 0, 0, 0, nil, nil
end
clock = clock + math.max(0, math.min(pause, interval))
local function drop(ids)
  for _, value in ipairs(redis.call('HMGET', members, unpack(ids))) do total = total - number(value) end
  redis.call('HDEL', members, unpack(ids))
  redis.call('ZREM', leases, unpack(ids))
end
-- Who has the incarnation of the holder, but has not sent its last beat, is a copy: of a machine that was cloned.
if holder == incarnation and last_stamp - (sent or 1e15) > 0 then holder = holder .. '*' end
-- A beat that was overtaken (on a connection given up while Redis was frozen) must not undo the later one.
local may_write = not holder or holder == replaced or (holder == incarnation and stamp - last_stamp > 0)
if may_write and count == 'leave' then
  drop({id})
elseif may_write then
  if not before and answered - 0 > 0 then back = back + 1 end
  total, holder = total + count - (before or 0), incarnation
  redis.call('HSET', members, id, count .. ' ' .. stamp .. ' ' .. incarnation)
  redis.call('ZADD', leases, clock + ttl, id)
end
local over = redis.call('ZRANGEBYSCORE', leases, '-inf', clock, 'LIMIT', 0, 500)
if #over > 0 then drop(over) end
local recount_at = size > 0 and not is_gone and tonumber(kept[6]) or 0 -- What is gone may still be in the total.
if not (math.abs(now - recount_at) < 60000) then -- It may be no number.
  total, recount_at = 0, now
  -- A lease that no server can have: without it, this key and the one of the members do not agree, and are as good as none.
  redis.call('ZREMRANGEBYSCORE', leases, clock + ttl + 86400000, 'inf')
  for _, value in ipairs(redis.call('HVALS', members)) do total = total + number(value) end
end
redis.call('HSET', state, 'total', total, 'clock', clock, 'lost_at', lost_at, 'back', back, 'beat_at', now, 'recount_at', recount_at)
if recount_at == now then for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, 86400) end end
local lease = redis.call('ZSCORE', leases, id)
return {total, redis.call('ZCARD', leases), back, clock, lost_at, lease and holder or '', tonumber(lease or 0), not before and answered - 0 > 0 and 1 or 0}
