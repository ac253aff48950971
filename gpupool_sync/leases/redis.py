"""The arbiter for many machines whose servers only tell statistics: one Redis that all of them can reach.

Every decision is one Lua script, so it is atomic, and is taken by the clock of the Redis server alone.  All scripts
are idempotent by the lease's id: a lost answer is asked for again.  The order of service is that of `tickets`, in Lua.

Needs Redis 6 or later (or Valkey) with ``maxmemory-policy noeviction``, and best an append-only file; all keys have
one hash tag, so they live on one node of a cluster.

What the scripts cannot see: ``FLUSHALL`` on a server that has run for long; an asynchronous failover to a replica that
has not heard of the latest grants; the last second before a power failure with ``appendfsync everysec``; a step of the
server's clock.  Each of them can lead to two holders of one card until a ttl has passed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import unquote, unquote_plus, urlsplit

import attrs

from gpupool_sync.clock import boottime
from gpupool_sync.errors import ConfigError, LeaseLost, LeaseStoreError, MissingExtra, unpin
from gpupool_sync.leases.base import (
    CLOSED_TIME,
    Claim,
    Granted,
    Hint,
    Holder,
    Lease,
    LeaseInfo,
    Outcome,
    Queued,
    Refused,
    Scope,
    Share,
    TicketInfo,
)
from gpupool_sync.leases.shared import CLOSED, Subscribers
from gpupool_sync.leases.tickets import ANSWER_TIME, MAX_FORWARD, RESERVE_TIME
from gpupool_sync.models import Reason
from gpupool_sync.wire import clean_text

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ImportError as exc:  # pragma: no cover - depends on the installation
    raise MissingExtra("lease_store='redis://…' needs redis-py: pip install 'gpupool-sync[redis]'") from exc

logger = logging.getLogger(__name__)

#: Seconds without renewal after which a lease ends, unless the claim says otherwise; and the most that one may say.
TTL = 60.0
MAX_TTL = 300.0
#: Seconds after its start in which a Redis that came up without our data grants nothing: the longest ttl.
QUARANTINE = MAX_TTL
#: Seconds that released, expired and withdrawn ids are remembered.
GONE_TIME = 600.0
#: Seconds after which the ticket of a waiter that says nothing is dropped, and of how many waiters of one process:
#: beyond, each of them asks less often (`waiting.MANY_WAITERS`).
TICKET_TTL = 5.0
MANY_WAITERS = 64
#: Seconds that an unread hint is kept for its process.
HINT_TIME = 30.0
#: Seconds to connect, and for one exchange.
CONNECT_TIMEOUT = 2.0
OPERATION_TIMEOUT = 5.0
#: Seconds that what was last read of other processes' leases is believed, where only ranking depends on it; and
#: between two readings while somebody waits.
BELIEVED = 2.0
REFRESH = 1.0
#: Cards of a claim that is still a usual one: Lua puts them on its stack.
MAX_USUAL = 1000
#: Explanations name at most so many cards.
MAX_REASONS = 64
_MAX_ENDED = 10_000


def _us(seconds: float) -> int:
    return round(seconds * 1e6)


# What the scripts are told of the above, where they are written.
_CONSTANTS = {
    "answer": _us(ANSWER_TIME),
    "reserve_time": _us(RESERVE_TIME),
    "forward": _us(MAX_FORWARD),
    "gone": _us(GONE_TIME),
    "hint_ms": int(HINT_TIME * 1000),
    "closed": _us(CLOSED_TIME),
    "max_reasons": MAX_REASONS,
}
_K = "local K = {" + ", ".join(f"{name} = {number}" for name, number in _CONSTANTS.items()) + "}\n"

# Times are whole microseconds, which a Lua number holds exactly; to JSON they go as text, as cjson rounds to 14 digits.
# A lease is {h: holder, c: cards, t: token, m: mode, a: amount, n: note, g: granted, l: ttl, r: revoked by}, a ticket
# {place, first, seq, hinted, spoke, to: list of hints, fp: of what it wants, h, count, m, a, reserve, n}.
_PRELUDE = (
    _K
    + """
local base = string.sub(KEYS[1], 1, -6)
local now
if ARGV[1] ~= '' then
  now = tonumber(ARGV[1])
else
  local t = redis.call('TIME')
  now = t[1] * 1000000 + t[2]
end
local me, quarantine = ARGV[2], tonumber(ARGV[3])
local body = cjson.decode(ARGV[4])
local EPOCH, TOKEN, LEASES, EXPIRES = base .. 'epoch', base .. 'token', base .. 'leases', base .. 'expires'
local CARDS, GONE, RELEASED = base .. 'cards', base .. 'gone', base .. 'released'
local CLOSED = base .. 'closed'
local TICKETS, WANTS, ORDER = base .. 'tickets', base .. 'wants', base .. 'order'
local SILENT, LOOSE, SEQ = base .. 'silent', base .. 'loose', base .. 'seq'

local function text(number) return string.format('%.0f', number) end
local function info(section, field)
  return string.match(redis.call('INFO', section), field .. ':([^\\r\\n]*)')
end

-- Until when nothing is granted. `connected` asks whether the server was restarted since we last looked.
local function closed_until(connected)
  local epoch = redis.call('HMGET', EPOCH, 'until', 'run')
  local known = epoch[1]
  if known and not connected then return tonumber(known) end
  local run = info('server', 'run_id')
  if known and epoch[2] == run then return tonumber(known) end
  local up = tonumber(info('server', 'uptime_in_seconds')) * 1000000
  local till = tonumber(known or 0)
  -- Data that came back without an append-only file is a snapshot: it lacks the latest grants.
  if up < quarantine and not (known and info('persistence', 'aof_enabled') == '1') then
    till = math.max(till, now + quarantine - up)
  end
  if known then  -- nobody could renew while it was down
    for _, id in ipairs(redis.call('ZRANGE', EXPIRES, 0, -1)) do
      local raw = redis.call('HGET', LEASES, id)
      if raw then
        local score = tonumber(redis.call('ZSCORE', EXPIRES, id))
        redis.call('ZADD', EXPIRES, text(math.max(score, now + cmsgpack.unpack(raw).l)), id)
      end
    end
  end
  redis.call('HSET', EPOCH, 'until', text(till), 'run', run)
  return till
end
"""
)

# Most claims and releases are of one whole card while nothing has expired or is closed. These come first in their
# scripts and do only what is left to do then, in the same data; where anything else is the case they change nothing,
# and the script goes on: its functions alone cost more to make than all of this.
_USUAL = """
local base = string.sub(KEYS[1], 1, -6)
local now = ARGV[1]
if now == '' then
  local t = redis.call('TIME')
  now = t[1] * 1000000 + t[2]
else
  now = tonumber(now)
end
local id = ARGV[5]
local usual = id ~= '' and redis.call('EXISTS', base .. 'closed') == 0
if usual then
  local first = redis.call('ZRANGE', base .. 'expires', 0, 0, 'WITHSCORES')
  usual = not first[1] or tonumber(first[2]) > now
end
local function waited_for() return redis.call('EXISTS', base .. 'order') == 1 end
"""

# A card that is free while nobody waits.
_USUAL_CLAIM = (
    _USUAL
    + """
local crowded, takens = false, {}
if usual then
  crowded = waited_for()
  local epoch = redis.call('HMGET', base .. 'epoch', 'until', 'run')
  usual = epoch[1] and tonumber(epoch[1]) <= now
    and redis.call('HEXISTS', base .. 'leases', id) == 0 and not redis.call('ZSCORE', base .. 'gone', id)
end
if usual then
  local keys = {}
  for key in string.gmatch(ARGV[6], '[^\\n]+') do keys[#keys + 1] = key end
  takens = redis.call('HMGET', base .. 'cards', unpack(keys))
  for i, taken in ipairs(takens) do
    if not taken then
      usual = not crowded
      if not usual then break end
      local key, ttl = keys[i], tonumber(ARGV[8])
      local token = math.max(tonumber(redis.call('GET', base .. 'token') or 0) + 1, math.floor(now / 1000))
      local told = string.format('%.0f', token)
      local lease = {h = ARGV[7], c = {key}, t = token, m = 'whole', a = 0, n = false, g = now, l = ttl}
      if ARGV[9] ~= '' then lease.n = string.sub(ARGV[9], 2) end
      redis.call('SET', base .. 'token', told)
      redis.call('HSET', base .. 'leases', id, cmsgpack.pack(lease))
      redis.call('ZADD', base .. 'expires', string.format('%.0f', now + ttl), id)
      redis.call('HSET', base .. 'cards', key, cmsgpack.pack({{id, 'whole', 0}}))
      return {key, told}
    end
  end
end
"""
)

# A script of its own, for claims without a ticket: what all else needs to know is sent only if it answers nothing.
# Where all cards are taken it refuses, whoever waits.
_TAKE = (
    _USUAL_CLAIM
    + """
if not usual or (crowded and redis.call('HEXISTS', base .. 'tickets', id) == 1) then return false end
local ids, listed, infos = {}, {}, {}
for i, taken in ipairs(takens) do
  if i > tonumber(ARGV[4]) then break end
  for _, each in ipairs(cmsgpack.unpack(taken)) do
    if not listed[each[1]] then
      listed[each[1]] = true
      ids[#ids + 1] = each[1]
    end
  end
end
local text = function(number) return string.format('%.0f', number) end
for from = 1, #ids, 1000 do  -- shared cards may have more leases than Lua has stack
  for i, raw in ipairs(redis.call('HMGET', base .. 'leases', unpack(ids, from, math.min(from + 999, #ids)))) do
    if raw then
      local lease = cmsgpack.unpack(raw)
      local left = tonumber(redis.call('ZSCORE', base .. 'expires', ids[from + i - 1]) or now) - now
      infos[#infos + 1] = {h = lease.h, c = lease.c, t = text(lease.t), m = lease.m, n = lease.n,
        a = string.format('%.17g', lease.a), age = text(now - lease.g), left = text(left), l = text(lease.l)}
    end
  end
end
return {'', cjson.encode(infos), crowded and '1' or '0'}
"""
)

_USUAL_RELEASE = (
    _USUAL
    + """
if usual and not waited_for() then
  local raw = redis.call('HGET', base .. 'leases', id)
  local lease = raw and cmsgpack.unpack(raw)
  if lease and not lease.r and lease.m == 'whole' and #lease.c == 1 then
    local key, gone = lease.c[1], base .. 'gone'
    redis.call('HDEL', base .. 'cards', key)
    redis.call('HSET', base .. 'released', key, string.format('%.0f', now))
    redis.call('HDEL', base .. 'leases', id)
    redis.call('ZREM', base .. 'expires', id)
    redis.call('ZREMRANGEBYSCORE', gone, '-inf', string.format('%.0f', now))
    redis.call('ZADD', gone, string.format('%.0f', now + tonumber(ARGV[6])), id)
    return {key}
  end
end
"""
)

_HELLO = (
    _PRELUDE
    + """
closed_until(true)
return info('memory', 'maxmemory_policy') or 'unknown'
"""
)

_LIBRARY = """
-- What stands on a card: a list of {id, mode, amount}.
local cards = {}
local function on(key)
  local list = cards[key]
  if not list then
    local raw = redis.call('HGET', CARDS, key)
    list = raw and cmsgpack.unpack(raw) or {}
    cards[key] = list
  end
  return list
end
local function prefetch(groups)
  local asked = {}
  local function load()
    if #asked == 0 then return end
    local raws = redis.call('HMGET', CARDS, unpack(asked))
    for i, key in ipairs(asked) do cards[key] = raws[i] and cmsgpack.unpack(raws[i]) or {} end
    asked = {}
  end
  for _, group in ipairs(groups) do
    for _, wanted in ipairs(group) do
      if not cards[wanted[1]] then asked[#asked + 1] = wanted[1] end
      if #asked == 500 then load() end
    end
  end
  load()
end
local function put_card(key, list)
  cards[key] = list
  if #list == 0 then redis.call('HDEL', CARDS, key) else redis.call('HSET', CARDS, key, cmsgpack.pack(list)) end
end

-- Cards whose last lease ended without being given back, and when; mostly there are none.
local closed = false
local function load_closed()
  local all = redis.call('HGETALL', CLOSED)
  for i = 1, #all, 2 do
    closed = closed or {}
    closed[all[i]] = tonumber(all[i + 1])
  end
end
local function close(key, at)
  closed = closed or {}
  closed[key] = at
  redis.call('HSET', CLOSED, key, text(at))
end
local function closed_ages()
  local ages = {}
  for key, at in pairs(closed or {}) do ages[key] = text(now - at) end
  return ages
end

-- Whether a card can serve a share beside its leases and beside what older tickets are about to take of it.
-- `hinting`: who is next for a card that has just been closed is told, to look whether it is empty.
local hinting, freed = false, {}
local function fits(key, room, mode, amount, pending)
  if closed and closed[key] and not (hinting and freed[key]) then return false end
  local list = on(key)
  room = room or 0
  if #list == 0 and not pending then return mode ~= 'memory' or amount <= room end
  if mode == 'whole' then return false end
  local number, limit, sum = 0, amount, amount
  local function add(other)
    if other[2] ~= mode then return false end
    number, limit, sum = number + 1, math.min(limit, other[3]), sum + other[3]
    return true
  end
  for _, other in ipairs(list) do if not add(other) then return false end end
  for _, other in ipairs(pending or {}) do if not add(other) then return false end end
  if mode == 'places' then return number < limit end
  return sum <= room
end

local function pick(claim, groups, plan, among)
  for _, group in ipairs(groups) do
    local found = {}
    for _, wanted in ipairs(group) do
      local key = wanted[1]
      if (not among or among[key]) and fits(key, wanted[2], claim.m, claim.a, plan[key]) then
        found[#found + 1] = key
        if #found == claim.count then return found end
      end
    end
  end
end
local function collect(claim, groups, plan)
  local best = {}
  for _, group in ipairs(groups) do
    if #group >= claim.count then
      local found = {}
      for _, wanted in ipairs(group) do
        if #found < claim.count and fits(wanted[1], wanted[2], claim.m, claim.a, plan[wanted[1]]) then
          found[#found + 1] = wanted[1]
        end
      end
      if #found > #best then best = found end
    end
  end
  return best
end

-- The queue.
local order, tickets, wants = nil, {}, {}
local function load_order()
  order = order or redis.call('ZRANGE', ORDER, 0, -1)
  return order
end
local function ticket(id)
  local t = tickets[id]
  if t == nil then
    local raw = redis.call('HGET', TICKETS, id)
    t = raw and cmsgpack.unpack(raw) or false
    if t then t.id = id end
    tickets[id] = t
  end
  return t
end
local function ticket_at(place)
  local id = string.sub(order[place], 17)
  if tickets[id] == nil then
    local ids = {}
    for i = place, math.min(place + 127, #order) do ids[#ids + 1] = string.sub(order[i], 17) end
    local raws = redis.call('HMGET', TICKETS, unpack(ids))
    for i, other in ipairs(ids) do
      if tickets[other] == nil then
        local t = raws[i] and cmsgpack.unpack(raws[i]) or false
        if t then t.id = other end
        tickets[other] = t
      end
    end
  end
  return tickets[id]
end
local function save(t)
  local id = t.id
  t.id = nil
  redis.call('HSET', TICKETS, id, cmsgpack.pack(t))
  t.id = id
end
local function member(t) return string.format('%015.0f:', t.seq) .. t.id end
local function keys_of(groups)
  local keys = {}
  for _, group in ipairs(groups) do for _, wanted in ipairs(group) do keys[wanted[1]] = wanted[2] or 0 end end
  return keys
end
local function wanted_by(t)
  local w = wants[t.fp]
  if not w then
    local groups = cjson.decode(redis.call('HGET', WANTS, t.id))
    w = {groups = groups, keys = keys_of(groups)}
    wants[t.fp] = w
  end
  return w
end
local function drop_ticket(id)
  local t = ticket(id)
  if not t then return false end
  redis.call('ZREM', ORDER, member(t))
  redis.call('HDEL', TICKETS, id)
  redis.call('HDEL', WANTS, id)
  redis.call('ZREM', SILENT, id)
  tickets[id], order = false, nil
  if redis.call('ZCARD', ORDER) == 0 then redis.call('DEL', LOOSE) end
  return true
end

-- Hints: to the caller's own tickets in the answer, to others by their lists. `given` is what was released, so that
-- readings from before do not count; what merely expired may still be in use.
local told, given = {}, {}
local function some(keys)
  local list = {}
  for key in pairs(keys) do
    if #list < 16 then list[#list + 1] = key end
  end
  return list
end
local function hint(t)
  t.hinted = now
  save(t)
  if t.to == me then
    told[#told + 1] = t.id
  else
    local list = base .. 'hints:' .. t.to
    redis.call('LPUSH', list, cjson.encode({t.id, some(freed), some(given)}))
    redis.call('LTRIM', list, 0, 4095)
    redis.call('PEXPIRE', list, K.hint_ms)
  end
end

-- Cards that came free while somebody waited and were not claimed since.
local function loosen(keys)
  local names = {}
  for key in pairs(keys) do names[#names + 1] = key end
  for i = 1, #names, 500 do redis.call('SADD', LOOSE, unpack(names, i, math.min(i + 499, #names))) end
end
local function touches(keys, free)
  for key in pairs(free) do if keys[key] ~= nil then return true end end
  return false
end
local function first_of(groups, free)
  for _, group in ipairs(groups) do
    for _, wanted in ipairs(group) do if free[wanted[1]] then return {wanted[1]} end end
  end
end
local function serve(plan, place, seq, contested)
  local free, head_found = {}, false
  for _, key in ipairs(redis.call('SMEMBERS', LOOSE)) do free[key] = true end
  load_order()
  for i = 1, #order do
    if next(free) == nil then return end
    local t = ticket_at(i)
    if t and place and (t.place > place or (t.place == place and t.seq >= seq)) then return end
    if t and (not t.hinted or now - t.hinted < K.answer) then
      local greedy = t.count > 1 or t.m == 'whole'
      local collects = not head_found and greedy and t.reserve and now - t.spoke < K.reserve_time
      head_found = head_found or (collects and t.count > 1)
      local w = wanted_by(t)
      if touches(w.keys, free) then
        prefetch(w.groups)
        local others = {}
        for key in pairs(free) do if not contested[key] then others[key] = true end end
        local picked = pick(t, w.groups, plan, others) or pick(t, w.groups, plan, free)
        if not picked and t.count > 1 then picked = pick(t, w.groups, plan) end
        if picked then
          if not t.hinted then hint(t) end
        elseif collects and t.count > 1 then
          picked = collect(t, w.groups, plan)
        elseif collects then
          head_found = true
          picked = first_of(w.groups, free)
        end
        for _, key in ipairs(picked or {}) do
          plan[key] = plan[key] or {}
          table.insert(plan[key], {t.id, t.m, t.a})
        end
        -- There is room left as long as the smallest share fits, not one of the same size.
        local least = t.m == 'memory' and 1e-6 or t.a
        for _, key in ipairs(picked or {}) do
          if t.m == 'whole' or not fits(key, w.keys[key], t.m, least, plan[key]) then free[key] = nil end
        end
      end
    end
  end
end
local function pass_on()
  if redis.call('ZCARD', ORDER) == 0 then return end
  loosen(freed)
  hinting = true
  serve({}, nil, nil, {})
  hinting = false
end

local function forget(id) redis.call('ZADD', GONE, text(now + K.gone), id) end
local function drop_lease(id, released)
  local raw = redis.call('HGET', LEASES, id)
  if not raw then return end
  local lease = cmsgpack.unpack(raw)
  released = released and not lease.r
  for _, key in ipairs(lease.c) do
    local rest = {}
    for _, other in ipairs(on(key)) do if other[1] ~= id then rest[#rest + 1] = other end end
    put_card(key, rest)
    freed[key] = true
    if not released and lease.m == 'whole' then
      close(key, math.min(now, tonumber(redis.call('ZSCORE', EXPIRES, id) or now)))
    end
    if released and #rest == 0 then
      given[key] = true
      redis.call('HSET', RELEASED, key, text(now))
    end
  end
  redis.call('HDEL', LEASES, id)
  redis.call('ZREM', EXPIRES, id)
end
-- First thing in every script: what has expired is not there.
local function sweep()
  local changed = false
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', EXPIRES, '-inf', text(now))) do
    drop_lease(id, false)
    forget(id)
    changed = true
  end
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', SILENT, '-inf', '(' .. text(now))) do
    changed = drop_ticket(id) or changed
  end
  for key, at in pairs(closed or {}) do
    local age = body.emptied and body.emptied[key]
    if now - at >= K.closed or (age and now - tonumber(age) > at) then
      closed[key] = nil
      redis.call('HDEL', CLOSED, key)
      freed[key] = true
      changed = true
    end
  end
  -- A script that has written may go on when memory is full: all but a claim should.
  if not body.id or redis.call('ZCOUNT', GONE, '-inf', text(now)) > 0 then
    redis.call('ZREMRANGEBYSCORE', GONE, '-inf', text(now))
  end
  if changed then pass_on() end
end

local function enter(id, lease)
  redis.call('HSET', LEASES, id, cmsgpack.pack(lease))
  redis.call('ZADD', EXPIRES, text(now + lease.l), id)
  for _, key in ipairs(lease.c) do
    local list = on(key)
    list[#list + 1] = {id, lease.m, lease.a}
    put_card(key, list)
  end
end
local function shown(id, lease)
  local left = tonumber(redis.call('ZSCORE', EXPIRES, id) or now) - now
  return {h = lease.h, c = lease.c, t = text(lease.t), m = lease.m, a = string.format('%.17g', lease.a), n = lease.n,
          age = text(now - lease.g), left = text(left), l = text(lease.l)}
end
local function answer(result)
  result.told, result.freed, result.given, result.closed = told, some(freed), some(given), closed_ages()
  result.crowded = redis.call('EXISTS', ORDER) == 1
  return cjson.encode(result)
end
local till = closed_until(false)
load_closed()
sweep()
"""

_CLAIM = """
local id = body.id
local function other(known, count)
  return known.h ~= body.h or count ~= body.count or known.m ~= body.m or known.a ~= body.a
end
local raw = redis.call('HGET', LEASES, id)
if raw then
  local lease = cmsgpack.unpack(raw)
  if other(lease, #lease.c) then return answer({s = 'other'}) end
  if lease.r then return answer({s = 'gone'}) end
  return answer({s = 'granted', lease = shown(id, lease)})
end
if redis.call('ZSCORE', GONE, id) then return answer({s = 'gone'}) end
local mine = ticket(id)
if mine and other(mine, mine.count) then return answer({s = 'other'}) end
if now < till then return answer({s = 'quarantine', left = text(till - now)}) end

local groups = cjson.decode(body.groups)
prefetch(groups)
local plan, picked = {}, nil
if redis.call('ZCARD', ORDER) == 0 then
  picked = pick(body, groups, plan)
else
  local fitting, number = {}, 0
  for _, group in ipairs(groups) do
    for _, wanted in ipairs(group) do
      if not fitting[wanted[1]] and fits(wanted[1], wanted[2], body.m, body.a) then
        fitting[wanted[1]] = true
        number = number + 1
      end
    end
  end
  if number >= body.count then
    loosen(fitting)
    serve(plan, mine and mine.place or now - body.waited, mine and mine.seq or math.huge, fitting)
    picked = pick(body, groups, plan, fitting)
  end
end

if picked then
  local token = math.max(tonumber(redis.call('GET', TOKEN) or 0) + 1, math.floor(now / 1000))
  redis.call('SET', TOKEN, text(token))
  local lease = {h = body.h, c = picked, t = token, m = body.m, a = body.a, n = body.n, g = now, l = body.l}
  enter(id, lease)
  drop_ticket(id)
  if body.m == 'whole' then redis.call('SREM', LOOSE, unpack(picked)) end
  pass_on()
  return answer({s = 'granted', lease = shown(id, lease)})
end

if body.queue then
  local fp = redis.sha1hex(body.groups)
  if not mine then
    mine = {id = id, seq = redis.call('INCR', SEQ), place = now - body.waited, fp = ''}
    mine.first = mine.place
    redis.call('ZADD', ORDER, text(mine.place), member(mine))
    tickets[id], order = mine, nil
  else
    local place = math.max(mine.first - K.forward, math.min(mine.place, now - body.waited))
    if place < mine.place then
      mine.place = place
      redis.call('ZADD', ORDER, text(place), member(mine))
      order = nil
    end
  end
  if mine.fp ~= fp then redis.call('HSET', WANTS, id, body.groups) end
  wants[fp] = {groups = groups, keys = keys_of(groups)}
  mine.fp, mine.to, mine.h, mine.count, mine.m, mine.a = fp, me, body.h, body.count, body.m, body.a
  mine.reserve, mine.n, mine.spoke, mine.hinted = body.reserve, body.n, now, false
  save(mine)
  redis.call('ZADD', SILENT, text(now + body.ticket), id)
  local position = 0
  load_order()
  for i = 1, #order do
    local t = ticket_at(i)
    if t and t.id == id then break end
    if t and (t.fp == fp or touches(wanted_by(t).keys, wants[fp].keys)) then position = position + 1 end
  end
  return answer({s = 'queued', position = position})
end

local reasons, infos, listed = {}, {}, {}
for _, group in ipairs(groups) do
  for _, wanted in ipairs(group) do
    if #reasons >= K.max_reasons then break end
    local list = on(wanted[1])
    local holder, code = false, 'queue'
    if #list > 0 then code = 'held'
    elseif closed and closed[wanted[1]] then code = 'closed'
    elseif not fits(wanted[1], wanted[2], body.m, body.a) then code = 'no-room' end
    for _, each in ipairs(list) do
      if not listed[each[1]] then
        local found = redis.call('HGET', LEASES, each[1])
        listed[each[1]] = found and cmsgpack.unpack(found)
        if found then infos[#infos + 1] = shown(each[1], listed[each[1]]) end
      end
      holder = holder or (listed[each[1]] and listed[each[1]].h)
    end
    reasons[#reasons + 1] = {wanted[1], code, holder}
  end
end
return answer({s = 'refused', reasons = reasons, infos = infos})
"""

_RELEASE = """
for _, id in ipairs(body.ids) do
  drop_lease(id, true)
  drop_ticket(id)
  forget(id)
end
pass_on()
return answer({})
"""

_RENEW = """
local kept, revoked = {}, {}
for i, item in ipairs(body.items) do
  local id, before = item[1], item[2]
  local raw = redis.call('HGET', LEASES, id)
  local lease = raw and cmsgpack.unpack(raw)
  kept[i] = false
  if lease and lease.r then
    revoked[#revoked + 1] = {id, lease.r}
  elseif lease then
    redis.call('ZADD', EXPIRES, text(now + lease.l), id)
    kept[i] = true
  elseif before and now < till and not redis.call('ZSCORE', GONE, id) then
    -- The data was lost, and nothing was granted since: its holder knows what it had.
    local free = true
    for _, key in ipairs(before.c) do free = free and fits(key, math.huge, before.m, before.a) end
    if free then
      local token = tonumber(before.t)
      enter(id, {h = before.h, c = before.c, t = token, m = before.m, a = before.a, n = before.n,
                 g = now - before.age, l = before.l})
      redis.call('SET', TOKEN, text(math.max(tonumber(redis.call('GET', TOKEN) or 0), token)))
      kept[i] = true
    end
  end
end
return answer({kept = kept, revoked = revoked})
"""

# Until its holder lets go or its ttl is over the lease stands: nobody else may have the card before.
_REVOKE = """
for _, each in ipairs(on(body.key)) do
  local raw = redis.call('HGET', LEASES, each[1])
  local lease = raw and cmsgpack.unpack(raw)
  if lease and text(lease.t) == body.token then
    lease.r = lease.r or body.by
    redis.call('HSET', LEASES, each[1], cmsgpack.pack(lease))
    return answer({found = true})
  end
end
return answer({found = false})
"""

_LEASES = """
local infos, released = {}, {}
local all = redis.call('HGETALL', LEASES)
for i = 1, #all, 2 do infos[#infos + 1] = shown(all[i], cmsgpack.unpack(all[i + 1])) end
local times = redis.call('HGETALL', RELEASED)
for i = 1, #times, 2 do
  local age = now - tonumber(times[i + 1])
  if age > K.gone then
    redis.call('HDEL', RELEASED, times[i])
  else
    released[#released + 1] = {times[i], text(age)}
  end
end
return answer({infos = infos, released = released})
"""

_QUEUE = """
local list = {}
load_order()
for i = 1, #order do
  local t = ticket_at(i)
  if t then
    list[#list + 1] = {h = t.h, groups = redis.call('HGET', WANTS, t.id), count = t.count, m = t.m,
                       a = string.format('%.17g', t.a), n = t.n, waited = text(now - t.place)}
  end
end
return answer({queue = list})
"""


class _Script:
    __slots__ = ("sha", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(self.text.encode()).hexdigest()  # noqa: S324 - the name that Redis gives it


def _whole(text: str, usual: str = "") -> _Script:
    # The usual in a block of its own: a chunk of Lua may have 200 local names.
    return _Script(f"do\n{usual}\nend\n{_PRELUDE}{_LIBRARY}{text}" if usual else _PRELUDE + _LIBRARY + text)


_SCRIPTS = {
    "take": _Script(_TAKE),
    "claim": _whole(_CLAIM, _USUAL_CLAIM),
    "release": _whole(_RELEASE, _USUAL_RELEASE),
    "renew": _whole(_RENEW),
    "revoke": _whole(_REVOKE),
    "leases": _whole(_LEASES),
    "queue": _whole(_QUEUE),
}

#: In the place of a body, for a script that needs none.
_NO_BODY = str(MAX_REASONS)
_dump = json.JSONEncoder(separators=(",", ":")).encode


@attrs.frozen
class _Held:
    """A lease of this process; `renewed_at` is before the last successful renewal was sent."""

    lease: Lease
    renewed_at: float

    @property
    def expires_at(self) -> float:
        return self.renewed_at + (self.lease.ttl or 0.0)


class _Known:
    """A lease as the server told of it: most of them nobody looks at."""

    __slots__ = ("_info", "_told", "expires_at", "read_at", "since_at")

    def __init__(self, told: Mapping[str, Any], now: float) -> None:
        self._told = told
        self._info: LeaseInfo | None = None
        self.read_at = now
        self.since_at = now - float(told["age"]) / 1e6
        self.expires_at = now + float(told["left"]) / 1e6

    @property
    def info(self) -> LeaseInfo:
        """What was told, at the time that it was read."""
        if self._info is None:
            told = self._told
            self._info = LeaseInfo(
                cards=tuple(told["c"]),
                holder=_holder_from(told["h"]),
                token=int(told["t"]),
                share=_share(told["m"], float(told["a"])),
                note=told["n"] or None,
                since=max(0.0, self.read_at - self.since_at),
                expires_in=max(0.0, self.expires_at - self.read_at),
            )
        return self._info


class _Retry(Retry):
    """redis-py's; an attempt that failed leaves nothing behind."""

    def call_with_retry(self, do: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        def attempt() -> Any:
            try:
                return do()
            except Exception as exc:
                unpin(exc)
                raise

        return super().call_with_retry(attempt, *args, **kwargs)


class RedisStore:
    """
    A `LeaseStore` for everybody who can reach one Redis.

    Connects at the first use.  A lease ends when it has not been renewed for its ttl, by the server's clock; every
    error of Redis means that nothing was granted.

    Args:
        url: ``redis://``, ``rediss://`` (TLS) or ``unix://``, as redis-py reads it.
        ttl: seconds that a lease lives without renewal if its claim does not say; at most 300.
        namespace: pools with different ones know nothing of each other.
        quarantine: seconds after its start in which a Redis without our data grants nothing.  Shorter than the
            longest ttl in use, holders from before the loss can still be on their cards.
        clock: for tests only: replaces the server's clock and this machine's.

    Raises:
        ConfigError: the URL cannot be used.
    """

    scope: Scope = "everybody"
    needs_listener = True

    def __init__(
        self,
        url: str,
        *,
        ttl: float = TTL,
        namespace: str = "gpupool",
        quarantine: float = QUARANTINE,
        clock: Callable[[], float] | None = None,
    ) -> None:
        if not namespace or not namespace.isprintable() or set(namespace) & set("{} "):
            raise ConfigError(f"namespace={namespace!r}: a word without braces is allowed")
        self.description = _describe(url)
        self._secrets = _secrets(url)
        self._url = url
        self._ttl = min(ttl, MAX_TTL)
        self._prefix = f"{{{namespace}}}:"
        self._epoch = f"{self._prefix}epoch"
        self._quarantine = str(_us(quarantine))
        self._test_clock = clock
        self._clock = boottime if clock is None else clock
        self._warned = False
        self._hints = Subscribers()
        self._fresh_state()
        _stores_of_this_process.add(self)

    def _fresh_state(self) -> None:
        # Guards the dictionaries below: dictionary work only, never an exchange with the server.
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}  # by lease id
        self._mine: dict[str, tuple[str, ...]] = {}  # card key -> lease ids of this process
        self._tickets: set[str] = set()
        self._ended: set[str] = set()  # released here: an answer that comes late is not entered
        self._ended_order: deque[str] = deque()
        self._known: dict[str, tuple[_Known, ...]] = {}  # card key -> leases as last read
        self._revoked: dict[str, str] = {}  # lease id -> by whom
        self._closed: Mapping[str, float] = {}  # card key -> when it was closed, as last read; replaced, never changed
        self._released_at: dict[str, float] = {}
        self._refreshed_at = -math.inf
        self._crowded_at = -math.inf  # when it was last told that somebody waits
        #: Connections that nobody uses at present, those that are closed as well. A deque: its methods are atomic.
        self._idle: deque[Any] = deque()
        self._me = os.urandom(8).hex()
        failed = False
        try:
            self._client = self._connect(OPERATION_TIMEOUT)
            # A blocking pop of its own: nobody else waits for a connection that sleeps.
            self._listening = self._connect(OPERATION_TIMEOUT)
        except ValueError:  # which may quote the URL
            failed = True
        if failed:
            raise ConfigError(f"lease_store={self.description!r}: redis-py cannot read this URL")

    def _connect(self, timeout: float) -> Any:
        return redis.Redis.from_url(
            self._url,
            decode_responses=True,
            protocol=2,
            socket_timeout=timeout,
            socket_connect_timeout=CONNECT_TIMEOUT,
            health_check_interval=0,
            max_connections=2**31,
            # Every script is idempotent. Once, for a connection that the server has closed since; never after a
            # timeout, which would double the time that a caller waits.
            retry=_Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
            redis_connect_func=self._greet,
        )

    def _greet(self, connection: Any) -> None:
        """First on each connection: a restart breaks them all, so nothing is asked of a server before it is judged."""
        connection.on_connect()
        connection.send_command("EVAL", _HELLO, 1, self._epoch, *self._arguments("{}"))
        policy = connection.read_response()
        if policy != "noeviction" and not self._warned:
            self._warned = True
            logger.warning(
                "%s has maxmemory-policy %s: it may drop leases when it is full; set it to noeviction",
                self.description,
                policy,
            )

    def __repr__(self) -> str:
        return f"RedisStore({self.description!r})"

    # -- asking ------------------------------------------------------------------------------------------------

    def _arguments(self, body: str) -> tuple[str, str, str, str]:
        now = "" if self._test_clock is None else str(_us(self._test_clock()))
        return now, self._me, self._quarantine, body

    def _ask(self, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        answer = self._told(name, body)
        assert isinstance(answer, dict)
        return answer

    def _told(self, name: str, body: Mapping[str, Any] | None, *usual: str) -> dict[str, Any] | list[str] | None:
        """
        What the script answers; a list where it was as *usual*, and that is all there was to do.

        None: a script that does nothing else (without a *body*) found that it was not.
        """
        script = _SCRIPTS[name]
        arguments = (*self._arguments(_NO_BODY if body is None else _dump(body)), *usual)
        failure: Exception | None = None  # raised from outside its handler, which would chain it in any case
        try:
            try:
                raw = self._exchange("EVALSHA", script.sha, "1", self._epoch, *arguments)
            except redis.exceptions.NoScriptError:
                raw = self._exchange("EVAL", script.text, "1", self._epoch, *arguments)
            if raw is None or isinstance(raw, list):
                self._crowded_at = -math.inf
                return raw
            answer = json.loads(raw)
        except (redis.RedisError, OSError, ValueError, TypeError) as exc:
            failure = exc
        if failure is not None:
            unpin(failure)
            try:
                raise self._error(failure)
            finally:
                failure = None  # it has this frame
        now = self._clock()
        self._closed = {key: now - float(age) / 1e6 for key, age in answer["closed"].items()}
        self._crowded_at = self._clock() if answer["crowded"] else -math.inf
        if answer["freed"]:
            self._note_freed(answer["freed"], answer["given"] or ())
        if answer["told"]:
            self._hints.tell(answer["told"])
        return dict(answer)

    def _exchange(self, *arguments: str) -> Any:
        """
        Send a command and return what is answered.

        By redis-py's connections, not by its client: that one looks before each command whether the connection still
        stands, and counts what it does, for half as much again as the exchange costs.  A connection that was closed
        since is told by its error, and opened anew.
        """
        parts = [b"*%d\r\n" % len(arguments)]
        for argument in arguments:
            each = argument.encode()
            parts.append(b"$%d\r\n%b\r\n" % (len(each), each))
        packed = [b"".join(parts)]
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._client.connection_pool.make_connection()

        def ask() -> Any:
            connection.send_packed_command(packed)
            return connection.read_response()

        # Used again only after an answer that was expected: whatever comes yet is not the answer to the next question.
        # Another error may be the answer to none, or be of a server that is not the right one any more.
        try:
            answer = connection.retry.call_with_retry(ask, lambda error: connection.disconnect())
        except redis.exceptions.NoScriptError:
            self._idle.append(connection)
            raise
        except BaseException:
            connection.disconnect()
            raise
        self._idle.append(connection)
        return answer

    def _error(self, exc: Exception) -> LeaseStoreError:
        told = self._redacted(str(exc))
        error = LeaseStoreError(f"{self.description} cannot be asked: {told or type(exc).__name__}")
        # A server that does not know AUTH repeats what it was sent, and a traceback shows all that is chained.
        behind: BaseException | None = exc
        while behind is not None and self._redacted(str(behind)) == str(behind):
            behind = behind.__cause__ or behind.__context__
        if behind is None:
            error.__cause__ = exc
        return error

    def _redacted(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "…")
        return text

    # -- claiming ----------------------------------------------------------------------------------------------

    def claim(self, claim: Claim) -> Outcome:
        mode, amount = _mode(claim.share)
        if claim.queue:
            # Before asking: a hint may come before the answer does.
            self._tickets.add(claim.id)
        ttl = self._ttl if claim.ttl is None else min(claim.ttl, MAX_TTL)
        sent = self._clock()
        keys = [wanted.key for group in claim.groups for wanted in group]
        names = "\n".join(keys)
        who = _holder_text(claim.holder)
        usual = ("", "")
        if mode == "whole" and claim.count == 1 and 0 < len(keys) <= MAX_USUAL and names.count("\n") == len(keys) - 1:
            usual = (claim.id, names)
        note = None if claim.note is None else claim.note[:200]
        alone = (who, str(_us(ttl)), "" if note is None else f"={note}")
        answer: dict[str, Any] | list[str] | None = None
        if usual[0] and not claim.queue:
            answer = self._told("take", None, *usual, *alone)
            usual = ("", "")
        if answer is None:
            body = {
                "id": claim.id,
                "h": who,
                "count": claim.count,
                "m": mode,
                "a": amount,
                # Text, as it is kept: most claims of most tickets are never unpacked.
                "groups": _dump([[[wanted.key, wanted.room_mb or 0.0] for wanted in group] for group in claim.groups]),
                "l": _us(ttl),
                "waited": _us(min(max(claim.waited, 0.0), 1e9)),
                "queue": claim.queue,
                "reserve": claim.reserve,
                "n": False if note is None else note,
                "ticket": _us(TICKET_TTL * max(1.0, len(self._tickets) / MANY_WAITERS)),
            }
            if claim.emptied:
                body["emptied"] = {key: str(_us(age)) for key, age in claim.emptied.items()}
            answer = self._told("claim", body, *usual, *alone)
        assert answer is not None
        if isinstance(answer, list):
            self._closed = {}
            if not answer[0]:
                if answer[2] == "1":
                    self._crowded_at = self._clock()
                return self._refused_short(keys, json.loads(answer[1]))
            told = {"c": answer[:1], "t": answer[1], "age": 0, "left": _us(ttl), "l": _us(ttl)}
            return Granted(self._enter(claim, told, sent))
        status = answer["s"]
        if status == "queued":
            return Queued(int(answer["position"]))
        if status == "granted":
            return Granted(self._enter(claim, answer["lease"], sent))
        if status == "gone":
            self._tickets.discard(claim.id)
            raise LeaseLost("this lease was released, withdrawn or has expired before")
        if status == "other":
            raise LeaseStoreError(f"{self.description}: this id is in use with another request")
        keys = keys[:MAX_REASONS]
        if status == "quarantine":
            left = float(answer["left"]) / 1e6
            text = f"quarantine after a restart of {self.description} that lost its data, {left:.0f} s are left"
            return Refused({key: Reason("quarantine", text) for key in keys})
        self._learn(answer["infos"] or (), keys)
        return Refused({key: _reason(code, held_by) for key, code, held_by in answer["reasons"]})

    def _refused_short(self, keys: Sequence[str], infos: Iterable[Mapping[str, Any]]) -> Refused:
        """All of *keys* are taken, by the leases that are told."""
        keys = keys[:MAX_REASONS]
        holders: dict[str, str] = {}
        for told in infos:
            for key in told["c"]:
                holders.setdefault(key, told["h"])
        self._learn(infos, keys)
        return Refused({key: _reason("held", holders.get(key)) for key in keys})

    def _enter(self, claim: Claim, told: Mapping[str, Any], sent: float) -> Lease:
        token = int(told["t"])
        with self._lock:
            known = self._held.get(claim.id)
            if known is not None and known.lease.token == token:
                return known.lease
            late = claim.id in self._ended
            if not late:
                lease = Lease(
                    id=claim.id,
                    holder=claim.holder,
                    cards=tuple(told["c"]),
                    token=token,
                    share=claim.share,
                    note=claim.note,
                    granted_at=sent - float(told["age"]) / 1e6,
                    ttl=float(told["l"]) / 1e6,
                )
                # What is left of the ttl was counted by the server before its answer came: count from the sending.
                renewed_at = sent + float(told["left"]) / 1e6 - float(told["l"]) / 1e6
                self._held[claim.id] = _Held(lease, renewed_at)
                for key in lease.cards:
                    self._mine[key] = (*self._mine.get(key, ()), claim.id)
                self._tickets.discard(claim.id)
        if late:
            self.release([claim.id])
            raise LeaseLost("this lease was released while it was being granted")
        return lease

    # -- keeping and giving back -------------------------------------------------------------------------------

    def renew(self, ids: Sequence[str]) -> Mapping[str, bool]:
        """
        As the contract says.

        While the arbiter is in quarantine after a loss of its data, a renewal brings the lease back.
        """
        sent = self._clock()
        with self._lock:
            asked = [lease_id for lease_id in ids if lease_id not in self._ended]
            items = [[lease_id, self._restorable(self._held.get(lease_id), sent)] for lease_id in asked]
        kept = dict.fromkeys(ids, False)
        if asked:
            answer = self._ask("renew", {"items": items})
            kept.update(zip(asked, map(bool, answer["kept"]), strict=True))
            self._revoked.update((lease_id, clean_text(by)[:300]) for lease_id, by in answer["revoked"] or ())
        with self._lock:
            for lease_id, alive in kept.items():
                held = self._held.get(lease_id)
                if held is not None and alive:
                    self._held[lease_id] = attrs.evolve(held, renewed_at=sent)
                elif held is not None:
                    self._forget_locked(lease_id)
        return kept

    def _restorable(self, held: _Held | None, now: float) -> Any:
        # One that has expired by our own count may be somebody else's by now.
        if held is None or now >= held.expires_at:
            return False
        lease = held.lease
        mode, amount = _mode(lease.share)
        return {
            "h": _holder_text(lease.holder),
            "c": lease.cards,
            "t": str(lease.token),
            "m": mode,
            "a": amount,
            "n": False if lease.note is None else lease.note[:200],
            "age": _us(max(0.0, now - lease.granted_at)),
            "l": _us(lease.ttl or 0.0),
        }

    def _forget_locked(self, lease_id: str) -> Lease | None:
        held = self._held.pop(lease_id, None)
        if held is None:
            return None
        for key in held.lease.cards:
            rest = tuple(other for other in self._mine.get(key, ()) if other != lease_id)
            if rest:
                self._mine[key] = rest
            else:
                self._mine.pop(key, None)
            self._known.pop(key, None)
        return held.lease

    def release(self, ids: Iterable[str]) -> None:
        gone = list(ids)
        if not gone:
            return
        with self._lock:
            for lease_id in gone:
                # First here, whatever happens on the way: a lease that is not renewed ends by itself.
                if lease_id not in self._ended:
                    self._ended_order.append(lease_id)
                    self._ended.add(lease_id)
                    if len(self._ended_order) > _MAX_ENDED:
                        self._ended.discard(self._ended_order.popleft())
                self._forget_locked(lease_id)
                self._tickets.discard(lease_id)
                self._revoked.pop(lease_id, None)
        answer = self._told("release", {"ids": gone}, gone[0] if len(gone) == 1 else "", str(_CONSTANTS["gone"]))
        if isinstance(answer, list):
            self._closed = {}
            self._note_freed(answer, answer)

    withdraw = release

    def revoke(self, key: str, token: int, by: str) -> bool:
        return bool(self._ask("revoke", {"key": key, "token": str(token), "by": by[:300]})["found"])

    def why_gone(self, lease_id: str) -> str | None:
        by = self._revoked.get(lease_id)
        return None if by is None else f"it was revoked by {by}"

    def closed(self) -> Mapping[str, float]:
        return self._closed

    def _note_freed(self, freed: Iterable[str], given: Iterable[str]) -> None:
        now = self._clock()
        with self._lock:
            for key in freed:
                self._known.pop(key, None)
            for key in given:
                self._released_at[key] = now

    # -- hints -------------------------------------------------------------------------------------------------

    def subscribe(self, hint: Hint) -> Callable[[], None]:
        return self._hints.add(hint, on_last=self.close)  # comes back by itself when somebody claims again

    def listen(self, timeout: float) -> None:
        """As the contract says; also reads, each second, who holds what, for those who wait."""
        if self._clock() - self._refreshed_at >= REFRESH:
            self.leases()
        failure: Exception | None = None
        try:
            found = self._listening.execute_command(
                "BRPOP", f"{self._prefix}hints:{self._me}", f"{min(max(timeout, 0.001), OPERATION_TIMEOUT / 2):.3f}"
            )
            if found is None:
                return
            claim_id, freed, given = json.loads(found[1])
        except (redis.RedisError, OSError, ValueError, TypeError) as exc:
            failure = exc
        if failure is not None:
            unpin(failure)
            try:
                raise self._error(failure)
            finally:
                failure = None  # it has this frame
        self._note_freed(freed or (), given or ())
        self._hints.tell([claim_id])

    # -- looking -----------------------------------------------------------------------------------------------

    def _learn(self, infos: Iterable[Mapping[str, Any]], keys: Iterable[str] | None) -> list[_Known]:
        """Remember what the server told of *keys* (None: of every card)."""
        now = self._clock()
        found: list[_Known] = []
        by_key: dict[str, list[_Known]] = {}
        for told in infos:
            known = _Known(told, now)
            found.append(known)
            for key in told["c"]:
                by_key.setdefault(key, []).append(known)
        with self._lock:
            if keys is None:
                self._known.clear()
                keys = by_key
            for key in keys:
                if key in by_key:
                    self._known[key] = tuple(by_key[key])
                else:
                    self._known.pop(key, None)
        return found

    def _believed(self, key: str, now: float) -> list[_Known]:
        return [
            known for known in self._known.get(key, ()) if now - known.read_at < BELIEVED and now < known.expires_at
        ]

    def _own(self, key: str, now: float) -> list[_Held]:
        found = (self._held.get(lease_id) for lease_id in self._mine.get(key, ()))
        return [held for held in found if held is not None and now < held.expires_at]

    def crowded(self) -> bool:
        return self._clock() - self._crowded_at < BELIEVED

    def is_held(self, key: str) -> bool:
        if key not in self._mine and key not in self._known:
            return False  # most cards, most of the time
        now = self._clock()
        return bool(self._own(key, now) or self._believed(key, now))

    def holders_of(self, key: str) -> Sequence[LeaseInfo]:
        now = self._clock()
        infos = {
            known.info.token: attrs.evolve(
                known.info, since=max(0.0, now - known.since_at), expires_in=known.expires_at - now
            )
            for known in self._believed(key, now)
        }
        for held in self._own(key, now):
            lease = held.lease
            if lease.token not in infos:
                infos[lease.token] = LeaseInfo(
                    cards=lease.cards,
                    holder=lease.holder,
                    token=lease.token,
                    share=lease.share,
                    note=lease.note,
                    since=max(0.0, now - lease.granted_at),
                    expires_in=held.expires_at - now,
                )
        return tuple(infos.values())

    def released_at(self, key: str) -> float | None:
        return self._released_at.get(key)

    def descriptors(self, lease_id: str) -> Sequence[int]:
        return ()

    def leases(self) -> Sequence[LeaseInfo]:
        answer = self._ask("leases", {})
        self._refreshed_at = now = self._clock()
        found = self._learn(answer["infos"] or (), None)
        with self._lock:
            for key, age in answer["released"] or ():
                self._released_at[key] = max(now - float(age) / 1e6, self._released_at.get(key, -math.inf))
        return [known.info for known in found]

    def queue(self) -> Sequence[TicketInfo]:
        return [
            TicketInfo(
                position=index,
                holder=_holder_from(told["h"]),
                cards=tuple(dict.fromkeys(key for group in json.loads(told["groups"]) for key, _ in group)),
                count=int(told["count"]),
                share=_share(told["m"], float(told["a"])),
                waited=max(0.0, float(told["waited"]) / 1e6),
                note=told["n"] or None,
            )
            for index, told in enumerate(self._ask("queue", {})["queue"] or ())
        ]

    # -- life --------------------------------------------------------------------------------------------------

    def forget_after_fork(self) -> None:
        """The parent's leases are not ours, and its connections are not used: answers to both would be mixed up."""
        _inherited.append((self._client, self._listening, self._idle))
        self._hints = Subscribers()
        self._fresh_state()

    def close(self) -> None:
        """Close the connections that nobody is using now; the store can be used again."""
        for _ in range(len(self._idle)):
            try:
                connection = self._idle.popleft()  # so that nobody takes it meanwhile
            except IndexError:
                break
            with contextlib.suppress(redis.RedisError, OSError):
                connection.disconnect()
            self._idle.append(connection)
        with contextlib.suppress(redis.RedisError, OSError):
            self._listening.connection_pool.disconnect(inuse_connections=False)


def _mode(share: Share | None) -> tuple[str, float]:
    if share is None:
        return "whole", 0.0
    if share.places is not None:
        return "places", share.places
    return "memory", share.memory_mb or 0.0


def _share(mode: str, amount: float) -> Share | None:
    if mode == "whole":
        return None
    return Share(places=int(amount)) if mode == "places" else Share(memory_mb=amount)


@lru_cache(4096)
def _reason(code: str, held_by: Any) -> Reason:
    if code == "held":
        return Reason("held", f"held by {_holder_from(held_by) if held_by else 'somebody'}")
    if code == "closed":
        return CLOSED
    if code == "no-room":
        return Reason("no-room", "too little memory is left for the share")
    return Reason("queue", "kept for somebody who has waited longer")


@lru_cache(4096)
def _holder_text(holder: Holder) -> str:
    return json.dumps([holder.id, holder.name, holder.user, holder.host, holder.pid], separators=(",", ":"))


@lru_cache(4096)
def _holder_from(text: str) -> Holder:
    try:
        who, name, user, host, pid = json.loads(text)
        return Holder(
            id=str(who),
            name=None if name is None else str(name)[:100],
            user=str(user)[:100],
            host=str(host)[:255],
            pid=int(pid),
        )
    except (ValueError, TypeError):
        return Holder(id="", name=None, user="?", host="?", pid=0)


def _describe(url: str) -> str:
    """The URL without what is secret in it."""
    parts, port = None, None
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # which quotes what stands for the port, and may be a password
        parts = None
    if parts is None:
        raise ConfigError(
            "lease_store: this is not the URL of a Redis; redis://host:6379/0 is (in a password, '/' is written %2F, "
            "'?' %3F and '#' %23)"
        )
    misplaced = parts.netloc and "@" not in parts.netloc if parts.scheme == "unix" else "@" in parts.path
    if "@" in parts.fragment or misplaced or ("@" in parts.query and "=" not in parts.query):
        # The beginning of a password was taken for the host, and the rest of it would be shown.
        raise ConfigError(
            "lease_store: an '@' stands where none is expected; in a password '/' is written %2F, '?' %3F and '#' %23"
        )
    if parts.scheme == "unix":
        return f"unix://{parts.path}"
    if parts.scheme not in ("redis", "rediss"):
        raise ConfigError("lease_store: the URL of a Redis begins with redis://, rediss:// or unix://")
    host = parts.hostname or "localhost"
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port or 6379}/{parts.path.strip('/') or '0'}"


def _secrets(url: str) -> tuple[str, ...]:
    """Passwords in the URL, as they stand there and as they are sent."""
    parts = urlsplit(url)
    found = [
        parts.password,
        *(pair.partition("=")[2] for pair in parts.query.split("&") if pair.startswith("password=")),
    ]
    # In the query '+' is a space, and some versions of redis-py decode what stands there twice.
    forms = {form for secret in found if secret for form in (secret, unquote(secret), unquote_plus(secret))}
    return tuple(forms | {unquote(form) for form in forms})


#: Connections that a forked child has from its parent: kept, because ending them is the parent's business.
_inherited: list[object] = []
_stores_of_this_process: weakref.WeakSet[RedisStore] = weakref.WeakSet()
_stores: dict[str, RedisStore] = {}
# Guards _stores: two pools of one process must share one store, or each would take the other for a stranger.
_stores_lock = threading.Lock()


def redis_store(url: str) -> RedisStore:
    """The store of this process for a Redis; claims bring their ttl."""
    with _stores_lock:
        if url not in _stores:
            _stores[url] = RedisStore(url)
        return _stores[url]


def _after_fork_in_child() -> None:
    global _stores_lock
    _stores_lock = threading.Lock()
    for store in list(_stores_of_this_process):
        store.forget_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
