-- One heartbeat of one server: store its number of clients, renew its lease, drop the servers whose
-- leases have ended, and return the cluster's total.
--
-- KEYS, all in one hash slot. Times are milliseconds.
--   members  hash: server id -> "clients sequence incarnation", the server's entry; then the URL of
--            its page, if it has one
--   leases   sorted set: server id -> end of its lease, on the lease clock
--   state    hash: total, clock, lost_at, returned, heartbeat_at, recount_at; resumed_at: when a
--            server that did not vouch for these data ended a pause, on the lease clock; gone: the last
--            servers that have left or were lost, the latest first, as lines "id left|lost clock
--            sequence incarnation", with those of the last heartbeat
-- They have no TTL: with maxmemory-policy volatile-lru, Redis would evict them first. When the last
-- server has left, the state stays for a day.
--
-- ARGV
--    1  server id
--    2  incarnation: a different one at each start of a server
--    3  sequence number of this heartbeat; it grows within an incarnation
--    4  number of clients, or "leave"
--    5  TTL: the length of the lease
--    6  heartbeat interval
--    7  incarnation that this one may replace, or ""
--    8  sequence number of the last acknowledged heartbeat; 0 = there is none
--    9  lease clock in the reply to it
--   10  sequence number of the last heartbeat sent before this one, acknowledged or not
--   11  URL of the server's page, or ""
--   12  milliseconds from the sending of the heartbeat that ARGV[9] replies to, to that of this one
--   13  lease clock in the reply to a late heartbeat, which this one repeats; 0 = it repeats none
--   14  most servers to list, or 0
--   15  lease clock in the last reply whose ends of servers the caller knows; 0 = it knows none
--
-- Returns
--    1  total number of clients
--    2  number of servers
--    3  how many servers have returned since the last loss of data (new servers do not count)
--    4  the lease clock
--    5  the last loss of data, on the lease clock
--    6  incarnation that holds the id, or ""; it ends in "*" if the caller is a copy of the holder
--    7  end of the holder's lease, or 0
--    8  1 if the caller has been acknowledged before but had no entry, else 0
--    9  end of the oldest lease of another server; 0 if there is none
--   10  1 if this heartbeat was refused because it is late: repeat it, with this clock
--   11  id, end of the lease and entry of each other server; empty if there are more than ARGV[14]
--   12  the servers that have gone since ARGV[15], as the state has them; "" if ARGV[14] is 0
--
-- The lease clock advances with heartbeats only: by the time since the previous heartbeat of any
-- server, but by one interval at most. So a server does not look dead because it could not report:
-- neither after an outage of any length nor after a jump of the clock of Redis.
local members, leases, state = KEYS[1], KEYS[2], KEYS[3]
local server_id, incarnation, clients, replaced_incarnation = ARGV[1], ARGV[2], ARGV[4], ARGV[7]
local sequence, acked_sequence = tonumber(ARGV[3]), tonumber(ARGV[8])
local last_sent_sequence = tonumber(ARGV[10]) or 1e15
local ttl, interval = tonumber(ARGV[5]), tonumber(ARGV[6])
local url = ARGV[11] ~= '' and ' ' .. ARGV[11] or ''

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function is_valid(number) return number and number >= 0 and number < 1e15 end
local function leading_number(text) return tonumber(string.match(text or '', '^%d+') or 0) end

local last_clock, told_clock = tonumber(ARGV[9]), tonumber(ARGV[13])
if not is_valid(last_clock) then last_clock = 0 end

-- Read with pcall: a key may hold another type of value.
local entry_count = redis.pcall('HLEN', members)
local lease_count = redis.pcall('ZCARD', leases)
local entry = redis.pcall('HGET', members, server_id)
local stored = redis.pcall('HMGET', state,
  'total', 'clock', 'lost_at', 'returned', 'heartbeat_at', 'recount_at', 'resumed_at')
local total, clock = tonumber(stored[1]), tonumber(stored[2])
local lost_at, returned = tonumber(stored[3]), tonumber(stored[4])
local elapsed = now - (tonumber(stored[5]) or now)
local own = type(entry) == 'string' and entry or ''
local old_clients, old_sequence, holder =
  string.match(string.match(own, '^(.*) %S+://%S+$') or own, '^(%d+) (%d+) (%S+)$')
old_sequence = tonumber(old_sequence)

-- The data are discarded if they cannot be right, or if they are older than the last reply to this
-- server (from a backup, or from a replica that lagged). Repairing them would need a rule for each
-- case. Without data there is only one case, and all servers report again within an interval.
local is_consistent = entry_count == lease_count and (holder or not entry)
  and is_valid(total) and is_valid(clock) and is_valid(lost_at) and is_valid(returned)
  and (entry_count > 0 or total == 0)
-- No server that knew these data has reported since a pause. They may come from a backup.
local resumed_at = tonumber(stored[7])
local is_unproven = is_consistent and is_valid(resumed_at) and clock - resumed_at < ttl

-- Whether the caller sent this heartbeat before the one by which it left. Not if it knows a later
-- clock: it has gone back to an earlier state of its machine, and is alive.
local function has_left_since()
  for line in string.gmatch(redis.call('HGET', state, 'gone') or '', '[^\n]+') do
    local id, left_at, last_sequence, sender = string.match(line, '^(%S+) left (%d+) (%d+) (%S+)$')
    if id == server_id and sender == incarnation then
      return tonumber(last_sequence) >= sequence and tonumber(left_at) >= told_clock
    end
  end
  return false
end

-- The caller has no entry, although its lease cannot have ended.
local is_entry_lost = not holder and acked_sequence > 0
  and is_consistent and last_clock >= lost_at and clock - last_clock < ttl and not has_left_since()
-- Recent heartbeats of servers that knew these data mean that they are in use, and that the caller
-- comes from elsewhere: from the other side of a split, say.
local is_outdated = (is_entry_lost and (is_unproven or elapsed > interval))
  or (is_consistent and last_clock - clock > 2 * interval
    and (is_unproven or elapsed > 2 * interval))
  or (holder == incarnation and acked_sequence > old_sequence)
local is_lost = not is_consistent or is_outdated
if is_lost then
  if entry_count ~= 0 or lease_count ~= 0 or stored.err or stored[2] then
    redis.call('DEL', members, leases, state)
  end
  -- The clock never goes back, and each loss has a moment of its own.
  clock = math.max(last_clock + 1, now)
  lost_at = clock
  entry_count, elapsed = 0, 0
  total, returned, old_clients, holder, resumed_at = 0, 0, nil, nil, nil
end

-- The lease that this heartbeat would renew has ended, or is not known, or its server has left: it
-- may have been held up on its way, and its server may be dead.
local is_late = not (is_lost or holder) and (clock - math.max(last_clock, told_clock) >= ttl
  or (clients ~= 'leave' and has_left_since()))

clock = clock + math.max(0, math.min(elapsed, interval))

-- After a pause, only a server that has an entry, and knew the data before, vouches for them.
local knows_data = holder == incarnation and acked_sequence > 0
if knows_data and last_clock < (resumed_at or 0) then
  resumed_at = 0
elseif not knows_data and entry_count > 0 and elapsed > 2 * interval then
  resumed_at = clock
end

local function drop(ids, how)
  local gone = {}
  for at, dropped in ipairs(redis.call('HMGET', members, unpack(ids))) do
    total = total - leading_number(dropped)
    local sent, sender = string.match(dropped or '', '^%d+ (%d+) ([!-~]+)')
    if how == 'left' then sent, sender = ARGV[3], incarnation end
    gone[at] = table.concat({ids[at], how, clock, sent or 0, sender or '-'}, ' ')
  end
  redis.call('HDEL', members, unpack(ids))
  redis.call('ZREM', leases, unpack(ids))
  -- Now that something is written, Redis refuses nothing for lack of memory.
  gone[#gone + 1] = redis.call('HGET', state, 'gone') or ''
  -- Room for more than a hundred lines.
  local text = string.sub(table.concat(gone, '\n'), 1, 20000)
  redis.call('HSET', state, 'gone', #text < 20000 and text or string.match(text, '^(.*)\n') or '')
end

-- A later heartbeat than the caller's last one, in its own incarnation, was sent by a copy of it: a
-- machine was cloned while it ran. The same one may come twice, over an old and a new connection.
if holder == incarnation and old_sequence > last_sent_sequence and old_sequence ~= sequence then
  holder = holder .. '*'
end

-- A late heartbeat must not undo a newer one: Redis still runs it when it wakes from a freeze,
-- although the caller has given up that connection.
local may_write = not (holder or is_late) or holder == replaced_incarnation
  or (holder == incarnation and sequence > old_sequence)
local was_missing = not old_clients and acked_sequence > 0
if may_write and clients == 'leave' then
  drop({server_id}, 'left')
elseif may_write then
  if was_missing then returned = returned + 1 end
  total = total + clients - (old_clients or 0)
  holder = incarnation
  -- ARGV[3] as it came: a Lua number would be rounded to 14 digits.
  redis.call('HSET', members, server_id, clients .. ' ' .. ARGV[3] .. ' ' .. incarnation .. url)
  -- The lease begins when the heartbeat was sent, even if it has been held up since.
  local sent_at = clock
  if told_clock >= lost_at then
    sent_at = told_clock
  elseif last_clock >= lost_at then
    sent_at = last_clock + tonumber(ARGV[12])
  end
  redis.call('ZADD', leases, math.min(clock, sent_at) + ttl, server_id)
end

-- At most 500 in one heartbeat, so that no single one takes long.
local expired = redis.call('ZRANGEBYSCORE', leases, '-inf', clock, 'LIMIT', 0, 500)
if #expired > 0 then drop(expired, 'lost') end

-- Count everything afresh once a minute, which bounds the life of an error in the total. A lost
-- entry forces it, because its clients may still be in the total.
local recount_at = entry_count > 0 and not is_entry_lost and tonumber(stored[6]) or 0
if not (math.abs(now - recount_at) < 60000) then -- "not <": recount_at may be NaN.
  total, recount_at = 0, now
  -- Remove leases that no server can have. The entries that they leave behind make the data
  -- inconsistent, so the next heartbeat discards them.
  redis.call('ZREMRANGEBYSCORE', leases, clock + (ttl + 86400000), 'inf')
  for _, counted in ipairs(redis.call('HVALS', members)) do
    total = total + leading_number(counted)
  end
end

local oldest = redis.call('ZRANGE', leases, 0, 1, 'WITHSCORES')
if entry_count == 0 and #oldest > 0 then
  -- The state may have a TTL. `gone` is kept: another Redis may still list the servers that it names.
  local kept = redis.call('HGET', state, 'gone')
  redis.call('DEL', state)
  if kept then redis.call('HSET', state, 'gone', kept) end
end
redis.call('HSET', state, 'total', total, 'clock', clock, 'lost_at', lost_at, 'returned', returned,
  'heartbeat_at', now, 'recount_at', recount_at, 'resumed_at', resumed_at or 0)
if #oldest == 0 then redis.call('EXPIRE', state, 86400) end

local own_lease_end = redis.call('ZSCORE', leases, server_id)
local listed, gone, max_listed = {}, {}, tonumber(ARGV[14])
if max_listed > 0 then
  for line in string.gmatch(redis.call('HGET', state, 'gone') or '', '[^\n]+') do
    if (tonumber(string.match(line, '^%S+ %S+ (%d+) ')) or 0) < tonumber(ARGV[15]) then break end
    gone[#gone + 1] = line
  end
end
if redis.call('ZCARD', leases) <= max_listed then
  local all = redis.call('ZRANGE', leases, 0, -1, 'WITHSCORES')
  for at = 1, #all, 2 do
    if all[at] ~= server_id then
      listed[#listed + 1] = all[at]
      listed[#listed + 1] = all[at + 1]
      listed[#listed + 1] = string.sub(redis.call('HGET', members, all[at]) or '', 1, 200)
    end
  end
end

local oldest_lease_end = tonumber(oldest[oldest[1] == server_id and 4 or 2] or 0)
return {total, redis.call('ZCARD', leases), returned, clock, lost_at, own_lease_end and holder or '',
  tonumber(own_lease_end or 0), was_missing and 1 or 0,
  is_valid(oldest_lease_end) and oldest_lease_end or 0, is_late and 1 or 0, listed,
  table.concat(gone, '\n')}
