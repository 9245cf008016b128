"""The Lua scripts that change and read a cluster's keys in Redis, each as one atomic step.

All keys share a prefix with a hash tag, so that one node of a Redis Cluster holds them all:

    worker:ID   a registration's record, with the server's own expiry
    workers     set of ids, the index of the registrations; readers remove ids that have expired
    catalog     hash: `epoch` and `revision`, from the first change on
    adapters    hash: name -> record
    changed     sorted set: name -> revision of its latest change, for names in `adapters`
    removed     the same for removed names, as far back as `history`
    history     sorted set of the latest revisions
    changes     channel on which every change is published; not a key

A revision is a counter in its upper bits and a random number in its lower bits. So two histories have no revision in
common after the change at which they part, and a revision that isn't in `history` shows a reader from a lost history: a
server that was emptied, or restored from an old copy, or replaced by a replica that hadn't got the latest changes.
"""

from __future__ import annotations

RANDOM_BITS = 20

# KEYS: worker:ID, workers. ARGV: id, record, lifetime in ms, channel. A renewal isn't published.
PUT_WORKER = """
local old = redis.call('GET', KEYS[1])
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
redis.call('SADD', KEYS[2], ARGV[1])
if old ~= ARGV[2] then redis.call('PUBLISH', ARGV[4], 'worker') end
"""

# KEYS: worker:ID, workers. ARGV: id, channel.
REMOVE_WORKER = """
redis.call('SREM', KEYS[2], ARGV[1])
if redis.call('DEL', KEYS[1]) == 1 then redis.call('PUBLISH', ARGV[2], 'worker') end
"""

# KEYS: workers, then worker:ID for each id in ARGV.
FORGET_EXPIRED = """
for i, id in ipairs(ARGV) do
  if redis.call('EXISTS', KEYS[i + 1]) == 0 then redis.call('SREM', KEYS[1], id) end
end
"""

# KEYS: catalog, adapters, changed, removed, history.
# ARGV: name, its expected record ('': none), its new record ('': remove), an epoch if there is none, a random number
# below 2^RANDOM_BITS, how many revisions `history` keeps, channel. Returns 1, or 0 if the record isn't as expected.
CHANGE_ADAPTER = f"""
if (redis.call('HGET', KEYS[2], ARGV[1]) or '') ~= ARGV[2] then return 0 end
local last = tonumber(redis.call('HGET', KEYS[1], 'revision') or '0')
local revision = string.format('%.0f', (math.floor(last / {1 << RANDOM_BITS}) + 1) * {1 << RANDOM_BITS} + ARGV[5])
redis.call('HSETNX', KEYS[1], 'epoch', ARGV[4])
redis.call('HSET', KEYS[1], 'revision', revision)
if ARGV[3] == '' then
  redis.call('HDEL', KEYS[2], ARGV[1])
  redis.call('ZREM', KEYS[3], ARGV[1])
  redis.call('ZADD', KEYS[4], revision, ARGV[1])
else
  redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
  redis.call('ZADD', KEYS[3], revision, ARGV[1])
  redis.call('ZREM', KEYS[4], ARGV[1])
end
redis.call('ZADD', KEYS[5], revision, revision)
local extra = redis.call('ZCARD', KEYS[5]) - ARGV[6]
if extra > 0 then
  local newest = redis.call('ZRANGE', KEYS[5], extra - 1, extra - 1)[1]
  redis.call('ZREMRANGEBYRANK', KEYS[5], 0, extra - 1)
  redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', newest)
end
redis.call('PUBLISH', ARGV[7], 'adapter')
return 1
"""

# KEYS: as above. ARGV: a reader's revision (0: none), the revision of the last name that the reader got on the page
# before (on the first page the reader's revision), the most names per page, an epoch to begin if history was lost.
# Returns epoch ('' before the first change), revision, whether this page begins the whole catalog, names, their
# records, the last name's revision ('' if this is the last page), and names removed. Each page is of one moment.
ADAPTER_CHANGES = """
if redis.call('HLEN', KEYS[2]) ~= redis.call('ZCARD', KEYS[3]) then
  return redis.error_reply('ERR the keys of the adapter catalog are not complete: was one of them deleted or evicted?')
end
local state = redis.call('HMGET', KEYS[1], 'epoch', 'revision')
local epoch, revision, since, cursor, is_whole = state[1] or '', state[2] or '0', ARGV[1], ARGV[2], 0
if since ~= '0' and since ~= revision and not redis.call('ZSCORE', KEYS[5], since) then
  local oldest = redis.call('ZRANGE', KEYS[5], 0, 0)[1]
  if oldest and tonumber(since) > tonumber(oldest) then
    epoch = ARGV[4]
    redis.call('HSET', KEYS[1], 'epoch', epoch)
  end
  since = '0'
end
if since == '0' then cursor, is_whole = '0', 1 end
local limit = tonumber(ARGV[3])
local names = redis.call('ZRANGEBYSCORE', KEYS[3], '(' .. cursor, '+inf', 'LIMIT', 0, limit)
local records, last, removed = {}, '', {}
if #names > 0 then records = redis.call('HMGET', KEYS[2], unpack(names)) end
if #names == limit then last = redis.call('ZSCORE', KEYS[3], names[limit]) end
if is_whole == 0 then removed = redis.call('ZRANGEBYSCORE', KEYS[4], '(' .. since, '+inf') end
return {epoch, revision, is_whole, names, records, last, removed}
"""
