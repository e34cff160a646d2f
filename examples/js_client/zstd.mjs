// One Zstandard frame (RFC 8878), with what docs/wire-format.md allows in it. What the RFC forbids is refused.
// Section numbers are those of the RFC.

import { check, Reader } from './reader.mjs';

const MAX_WINDOW = 2 ** 23;
const MAX_BLOCK = 2 ** 17;
const EMPTY = '40,181,47,253,32,0,1,0,0';

const highestBit = (number) => 31 - Math.clz32(number);

/** Bits that are read from the last to the first; the last byte's highest one bit ends them (4.1). */
class BackwardBits {
  constructor(bytes) {
    check(bytes.length > 0 && bytes.at(-1) !== 0, 'zstd: a bit stream without an end');
    this.bytes = bytes;
    this.left = 8 * bytes.length - 8 + highestBit(bytes.at(-1));
  }

  /** The next bits, at most 31, as a number; beyond the first there are zeros. */
  peek(count) {
    const from = Math.max(this.left - count, 0);
    const have = Math.max(this.left, 0) - from;
    const at = from >> 3;
    let number = 0;
    for (let i = 4; i >= 0; i--) number = number * 256 + (this.bytes[at + i] ?? 0);
    return (Math.floor(number / 2 ** (from & 7)) % 2 ** have) * 2 ** (count - have);
  }

  /** Consume bits; `left` below 0 says that there were not enough. */
  read(count) {
    const number = this.peek(count);
    this.left -= count;
    return number;
  }

  end() {
    check(this.left === 0, `zstd: ${this.left} bits are left in a stream`);
  }
}

// -- finite state entropy (4.1) --------------------------------------------------------------------------------------

/** Make a decoding table from how many states each symbol has, -1 being less than one. */
function fseTable(counts, log) {
  const size = 2 ** log;
  const symbols = new Uint8Array(size);
  let high = size;
  counts.forEach((count, symbol) => count === -1 && (symbols[--high] = symbol));
  let at = 0;
  counts.forEach((count, symbol) => {
    for (let i = 0; i < count; i++) {
      symbols[at] = symbol;
      do at = (at + (size >> 1) + (size >> 3) + 3) % size;
      while (at >= high);
    }
  });
  const next = counts.map(Math.abs);
  const states = Array.from(symbols, (symbol) => {
    const number = next[symbol]++;
    const bits = log - highestBit(number);
    return { symbol, bits, base: number * 2 ** bits - size };
  });
  return { log, states };
}

/** Read the description of a table for symbols up to `maxSymbol` (4.1.1). */
function readFseTable(reader, maxLog, maxSymbol) {
  const bytes = reader.bytes.subarray(reader.at);
  let at = 0;
  const peek = (count) => {
    let number = 0;
    for (let i = 2; i >= 0; i--) number = number * 256 + (bytes[(at >> 3) + i] ?? 0);
    return (number >> (at & 7)) % 2 ** count;
  };
  const log = peek(4) + 5;
  check(log <= maxLog, `zstd: an accuracy of ${log} bits, at most ${maxLog} are possible`);
  at = 4;
  const counts = [];
  let left = 2 ** log;
  while (left > 0) {
    // A number from 0 to left + 1; the lower ones of these take a bit less.
    const bits = highestBit(left + 1) + 1;
    const short = 2 ** bits - 1 - (left + 1);
    let number = peek(bits);
    if (number % 2 ** (bits - 1) < short) {
      number %= 2 ** (bits - 1);
      at += bits - 1;
    } else {
      if (number >= 2 ** (bits - 1)) number -= short;
      at += bits;
    }
    counts.push(number - 1);
    left -= Math.abs(number - 1);
    if (number === 1) {
      let zeros;
      do {
        zeros = peek(2);
        at += 2;
        for (let i = 0; i < zeros; i++) counts.push(0);
      } while (zeros === 3 && counts.length <= maxSymbol);
    }
    check(counts.length <= maxSymbol + 1, `zstd: a symbol above ${maxSymbol}`);
  }
  check(left === 0, 'zstd: a table with more states than it has');
  reader.take(Math.ceil(at / 8));
  return fseTable(counts, log);
}

/** A state that yields symbols. */
class Fse {
  constructor(table, bits) {
    this.table = table;
    this.bits = bits;
    this.state = table.states[bits.read(table.log)];
  }

  get symbol() {
    return this.state.symbol;
  }

  step() {
    this.state = this.table.states[this.state.base + this.bits.read(this.state.bits)];
  }
}

// -- literals (3.1.1.3.1, 4.2) ---------------------------------------------------------------------------------------

/** Read a Huffman tree: for each number of `log` bits the symbol and the length of the word that it begins with. */
function readTree(reader) {
  const header = reader.byte();
  const weights = [];
  if (header >= 128) {
    const packed = reader.take(Math.ceil((header - 127) / 2));
    for (let i = 0; i < header - 127; i++) weights.push(i % 2 ? packed[i >> 1] & 15 : packed[i >> 1] >> 4);
  } else {
    const part = new Reader(reader.take(header));
    const table = readFseTable(part, 6, 255);
    const bits = new BackwardBits(part.take(part.left));
    let [state, other] = [new Fse(table, bits), new Fse(table, bits)];
    check(bits.left >= 0, 'zstd: weights without two states');
    while (bits.left >= 0) {
      check(weights.length < 254, 'zstd: more than 255 weights');
      weights.push(state.symbol);
      state.step();
      [state, other] = [other, state];
    }
    weights.push(state.symbol); // of the state that did not run dry
  }
  const sum = weights.reduce((total, weight) => total + (weight && 2 ** (weight - 1)), 0);
  const log = highestBit(sum) + 1;
  const missing = 2 ** log - sum;
  check(sum > 0 && log <= 11 && (missing & (missing - 1)) === 0, 'zstd: weights that make no tree');
  weights.push(highestBit(missing) + 1);
  check(weights.includes(1), 'zstd: a tree without a longest word');
  const entries = [];
  for (let weight = 1; weight <= log; weight++) {
    weights.forEach((own, symbol) => {
      if (own === weight) for (let i = 0; i < 2 ** (weight - 1); i++) entries.push({ symbol, bits: log + 1 - weight });
    });
  }
  return { log, entries };
}

function readWords(tree, bytes, literals) {
  const bits = new BackwardBits(bytes);
  for (let i = 0; i < literals.length; i++) {
    const entry = tree.entries[bits.peek(tree.log)];
    literals[i] = entry.symbol;
    bits.left -= entry.bits;
  }
  bits.end();
}

/** Read the literals of a block, at most so many; `memory.tree` is the last tree. */
function readLiterals(reader, memory, most) {
  const first = reader.byte();
  const type = first & 3;
  const format = (first >> 2) & 3;
  const more = (count) => reader.number(count) * 256 + first;
  const checked = (size) => {
    check(size <= most, `zstd: ${size} literals, at most ${most} are possible`);
    return size;
  };
  if (type < 2) {
    const size = checked(format === 1 ? more(1) >> 4 : format === 3 ? more(2) >> 4 : first >> 3);
    return type === 0 ? reader.take(size) : new Uint8Array(size).fill(reader.byte());
  }
  const width = [10, 10, 14, 18][format];
  const sizes = Math.floor(more([2, 2, 3, 4][format]) / 16);
  const literals = new Uint8Array(checked(sizes % 2 ** width));
  const body = new Reader(reader.take(Math.floor(sizes / 2 ** width)));
  if (type === 2) memory.tree = readTree(body);
  check(memory.tree, 'zstd: no tree to use again');
  if (format === 0) {
    readWords(memory.tree, body.take(body.left), literals);
    return literals;
  }
  check(literals.length >= 6, `zstd: ${literals.length} literals in four streams`);
  const streams = [2, 2, 2].map((count) => body.number(count));
  const quarter = Math.ceil(literals.length / 4);
  for (let i = 0; i < 4; i++) {
    const end = i < 3 ? (i + 1) * quarter : literals.length;
    readWords(memory.tree, body.take(streams[i] ?? body.left), literals.subarray(i * quarter, end));
  }
  return literals;
}

// -- sequences (3.1.1.3.2) -------------------------------------------------------------------------------------------

/** The lowest number of each code, from the extra bits that each has. */
function lowest(extra, first) {
  return extra.map((_, code) => extra.slice(0, code).reduce((sum, bits) => sum + 2 ** bits, first));
}

const repeated = (count, value) => new Array(count).fill(value);

const LITERAL_EXTRA = [...repeated(16, 0), 1, 1, 1, 1, 2, 2, 3, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];
const LITERAL_LOWEST = lowest(LITERAL_EXTRA, 0);
const MATCH_EXTRA = [...repeated(32, 0), 1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];
const MATCH_LOWEST = lowest(MATCH_EXTRA, 3);

/** The three kinds of codes, with the tables that need no description (3.1.1.3.2.2). */
const CODES = [
  {
    maxLog: 9,
    maxSymbol: 35,
    usual: fseTable(
      [4, 3, ...repeated(11, 2), 1, 1, 1, ...repeated(9, 2), 3, 2, ...repeated(5, 1), ...repeated(4, -1)],
      6,
    ),
  },
  {
    maxLog: 8,
    maxSymbol: 31,
    usual: fseTable([...repeated(6, 1), 2, 2, 2, ...repeated(15, 1), ...repeated(5, -1)], 5),
  },
  {
    maxLog: 9,
    maxSymbol: 52,
    usual: fseTable([1, 4, 3, ...repeated(6, 2), ...repeated(37, 1), ...repeated(7, -1)], 6),
  },
];

function readCodeTable(reader, mode, { maxLog, maxSymbol, usual }, last) {
  if (mode === 0) return usual;
  if (mode === 2) return readFseTable(reader, maxLog, maxSymbol);
  if (mode === 1) {
    const symbol = reader.byte();
    check(symbol <= maxSymbol, `zstd: symbol ${symbol}, at most ${maxSymbol} is possible`);
    return { log: 0, states: [{ symbol, bits: 0, base: 0 }] };
  }
  check(last, 'zstd: no table to use again');
  return last;
}

/** The distance of a match, of those that are remembered or a new one, which is then remembered (3.1.1.5). */
function distanceOf(offset, literals, recent) {
  const index = offset > 3 ? 3 : offset - 1 + (literals === 0 ? 1 : 0);
  const distance = offset > 3 ? offset - 3 : index === 3 ? recent[0] - 1 : recent[index];
  recent.splice(Math.min(index, 2), 1);
  recent.unshift(distance);
  return distance;
}

function readCompressedBlock(reader, memory, out, window, maxBlock) {
  const end = Math.min(out.at + maxBlock, out.bytes.length);
  const room = (count) => check(out.at + count <= end, 'zstd: a block is too long');
  const literals = new Reader(readLiterals(reader, memory, end - out.at));
  const copyLiterals = (count) => {
    room(count);
    out.bytes.set(literals.take(count), out.at);
    out.at += count;
  };

  let count = reader.byte();
  if (count === 255) count = reader.number(2) + 0x7f00;
  else if (count > 127) count = (count - 128) * 256 + reader.byte();
  if (count === 0) {
    reader.end();
  } else {
    const modes = reader.byte();
    check((modes & 3) === 0, 'zstd: a reserved bit is set');
    memory.tables = CODES.map((code, i) => readCodeTable(reader, (modes >> (6 - 2 * i)) & 3, code, memory.tables[i]));
    const bits = new BackwardBits(reader.take(reader.left));
    const [literalCode, offsetCode, matchCode] = memory.tables.map((table) => new Fse(table, bits));
    for (let i = 1; i <= count; i++) {
      const offset = 2 ** offsetCode.symbol + bits.read(offsetCode.symbol);
      let length = MATCH_LOWEST[matchCode.symbol] + bits.read(MATCH_EXTRA[matchCode.symbol]);
      const numLiterals = LITERAL_LOWEST[literalCode.symbol] + bits.read(LITERAL_EXTRA[literalCode.symbol]);
      if (i < count) for (const code of [literalCode, matchCode, offsetCode]) code.step();
      check(bits.left >= 0, 'zstd: sequences end too early');
      copyLiterals(numLiterals);
      const distance = distanceOf(offset, numLiterals, memory.recent);
      check(0 < distance && distance <= Math.min(out.at, window), `zstd: a match ${distance} bytes back`);
      room(length);
      for (; length > 0; length--, out.at++) out.bytes[out.at] = out.bytes[out.at - distance];
    }
    bits.end();
  }
  copyLiterals(literals.left);
}

// -- frame (3.1.1) ---------------------------------------------------------------------------------------------------

/** Read the header, return window and content size. */
function readHeader(reader) {
  check(reader.number(4) === 0xfd2fb528, 'zstd: not a frame');
  const flags = reader.byte();
  check((flags & 0x1f) === 0, 'zstd: a checksum, a dictionary, or a reserved or unused bit');
  const single = (flags & 0x20) !== 0;
  const exponent = single ? 0 : reader.byte();
  const form = flags >> 6;
  check(single || form > 0, 'zstd: no content size');
  const size = reader.number([1, 2, 4, 8][form]) + (form === 1 ? 256 : 0);
  check([0, 256, 65792, 2 ** 32][form] <= size, 'zstd: a content size in more bytes than it takes');
  const window = single ? size : 2 ** (10 + (exponent >> 3)) * (1 + (exponent & 7) / 8);
  check(window <= MAX_WINDOW, `zstd: a window of ${window} bytes, at most ${MAX_WINDOW} are possible`);
  return [window, size];
}

/**
 * Return the content of a frame, which must end with the bytes.
 *
 * @param {Uint8Array} bytes
 * @param {number} maxBytes of content; a frame that declares more is refused before anything is allocated
 * @returns {Uint8Array}
 * @throws {FrameError}
 */
export function decompress(bytes, maxBytes) {
  const reader = new Reader(bytes);
  const [window, size] = readHeader(reader);
  check(size <= maxBytes, `zstd: a content of ${size} bytes, at most ${maxBytes} are possible`);
  check(size > 0 || String(bytes) === EMPTY, 'zstd: not the one frame without content');
  const maxBlock = Math.min(window, MAX_BLOCK);
  const out = { bytes: new Uint8Array(size), at: 0 };
  const memory = { tree: undefined, tables: [], recent: [1, 4, 8] };
  for (let last = false; !last; ) {
    const header = reader.number(3);
    const type = (header >> 1) & 3;
    const length = header >> 3;
    last = (header & 1) === 1;
    check(length <= maxBlock, `zstd: a block of ${length} bytes, at most ${maxBlock} are possible`);
    check(type < 3, 'zstd: a reserved type of block');
    if (type === 2) {
      readCompressedBlock(new Reader(reader.take(length)), memory, out, window, maxBlock);
    } else {
      check(out.at + length <= size, 'zstd: a block is too long');
      if (type === 0) out.bytes.set(reader.take(length), out.at);
      else out.bytes.fill(reader.byte(), out.at, out.at + length);
      out.at += length;
    }
  }
  check(out.at === size, `zstd: ${out.at} bytes of content, ${size} are declared`);
  reader.end();
  return out.bytes;
}
