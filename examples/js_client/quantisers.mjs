// From codes to values. See "Quantising stages" in docs/wire-format.md.
//
// A quantiser has `numCodes(n)`, `tableBytes(n)` and `open(reader, n)`, which reads the table of n values and returns
// `bits(code, i)`, the binary32 pattern of the i-th value. One that `drops` values returns `rest` too, the pattern of
// those that are not sent. One that is `neverAsItIs` writes each tensor after `per-tensor` as a segment. Patterns and
// not numbers, since storing a number may change the payload of a NaN.

import { check } from './reader.mjs';

const NAN = 0x7fc00000;
const word = new DataView(new ArrayBuffer(4));

/** The pattern of a number, rounded to binary32. */
function bitsOf(number) {
  word.setFloat32(0, number);
  return word.getUint32(0);
}

/** The number with a pattern. */
function numberOf(bits) {
  word.setUint32(0, bits);
  return word.getFloat32(0);
}

const isFinite32 = (bits) => (bits & 0x7f800000) !== 0x7f800000;

/** Read the pattern of a scale: finite and neither negative nor -0, or the one NaN. */
function readScale(reader) {
  const bits = reader.number(4);
  check(bits < 0x7f800000 || bits === NAN, `${bits.toString(16)} is not a scale`);
  return bits;
}

/** Whether all values under this scale have the same code. */
const isFlat = (scale) => scale === 0 || scale === NAN;

/** One whose code is a pattern or a level, whatever the other values are. */
const withoutTable = (numCodes, bits) => ({ numCodes: () => numCodes, tableBytes: () => 0, open: () => ({ bits }) });

function fp16(code) {
  const sign = code & 0x8000 ? -1 : 1;
  const exponent = (code >> 10) & 0x1f;
  const fraction = code & 0x3ff;
  if (exponent === 31) return ((code & 0x8000) << 16 | 0x7f800000 | fraction << 13) >>> 0;
  return bitsOf(exponent ? sign * (1024 + fraction) * 2 ** (exponent - 25) : sign * fraction * 2 ** -24);
}

/** Read `clusters` centroids, of which the last one is that of the values that are not sent. */
function readCentroids(reader, clusters, n) {
  const table = Array.from({ length: clusters }, () => reader.number(4));
  const sent = table.slice(0, -1);
  if (table.every((bits) => bits === NAN)) {
    check(n === 0, `${n} values are sent where none is finite`);
  } else {
    check(table.every((bits) => isFinite32(bits) && bits !== 0x80000000), 'a centroid is not finite, or is -0');
    const numbers = sent.map(numberOf);
    check(numbers.every((number, i) => i === 0 || numbers[i - 1] <= number), 'the centroids do not ascend');
  }
  const bits = (code) => {
    check(code < sent.length, `code ${code}, there are ${sent.length}`);
    return sent[code];
  };
  return { rest: table.at(-1), bits, isNaN: table[0] === NAN };
}

function kmeans({ clusters = 3 }) {
  return {
    drops: true,
    numCodes: () => clusters - 1,
    tableBytes: () => 4 * clusters,
    open: (reader, n) => readCentroids(reader, clusters, n),
  };
}

function kmeansAuto({ max_clusters: most = 16 }) {
  return {
    drops: true,
    numCodes: () => most - 1,
    tableBytes: () => 1 + 4 * most,
    open(reader, n) {
      const clusters = reader.byte() + 1;
      check(2 <= clusters && clusters <= most, `${clusters} clusters, possible are 2 to ${most}`);
      const table = readCentroids(reader, clusters, n);
      check(clusters === 2 || !table.isNaN, `${clusters} clusters of values that are not finite`);
      return table;
    },
  };
}

/** A scale for each block, and levels from -L to L. */
const blocks = (L) => ({ block = 256 }) => ({
  numCodes: () => 2 * L + 1,
  tableBytes: (n) => 4 * Math.ceil(n / block),
  open(reader, n) {
    check(4 * Math.ceil(n / block) <= reader.left, `the frame ends too early for the scales of ${n} values`);
    const scales = Uint32Array.from({ length: Math.ceil(n / block) }, () => readScale(reader));
    return {
      bits(code, i) {
        const scale = scales[Math.floor(i / block)];
        check(code === L || !isFlat(scale), `level ${code - L} in a block where only 0 has a meaning`);
        return scale === NAN ? NAN : bitsOf(Math.fround((code - L) / L) * numberOf(scale));
      },
    };
  },
});

/** Plus or minus a scale, which is that of the job or else is sent. */
const signs = (fixed) => ({
  numCodes: () => 2,
  tableBytes: () => (fixed === undefined ? 4 : 0),
  open(reader) {
    const scale = fixed === undefined ? readScale(reader) : bitsOf(fixed);
    return {
      bits(code) {
        check(code === 0 || !isFlat(scale), 'a value below 0 where the scale is 0 or not a number');
        return (code ? scale ^ 0x80000000 : scale) >>> 0;
      },
    };
  },
});

function rqm({ levels = 16, clip = 1, extension = 1 }) {
  const decoded = (code) => bitsOf(((clip + extension) * (2 * code - (levels - 1))) / (levels - 1));
  return { ...withoutTable(levels, decoded), neverAsItIs: true };
}

const MAX_RANKS = 2 ** 24;

function ranks() {
  return {
    neverAsItIs: true,
    numCodes: (n) => Math.max(n, 1),
    tableBytes: () => 1,
    open(reader, n) {
      check(n <= MAX_RANKS, `${n} ranks, at most ${MAX_RANKS} are possible`);
      const byte = reader.byte();
      check(byte === 0 || (byte === 1 && n > 0), `${byte} before ${n} ranks`);
      const seen = new Uint8Array(n);
      return {
        bits(code) {
          check(byte === 1 ? code === 0 : !seen[code], `rank ${code} where it cannot be`);
          seen[code] = 1;
          return byte === 1 ? NAN : bitsOf(code + 1);
        },
      };
    },
  };
}

export const QUANTISERS = {
  raw: { id: 1, make: () => withoutTable(2 ** 32, (code) => code) },
  bf16: { id: 2, make: () => withoutTable(2 ** 16, (code) => (code << 16) >>> 0) },
  fp16: { id: 3, make: () => withoutTable(2 ** 16, fp16) },
  kmeans: { id: 31, make: kmeans },
  int8: { id: 32, make: blocks(127) },
  int4: { id: 33, make: blocks(7) },
  int2: { id: 34, make: blocks(1) },
  ternary: { id: 35, make: () => signs() },
  sign: { id: 36, make: ({ scale = 'mean' }) => ({ ...signs(scale === 'mean' ? undefined : scale), neverAsItIs: true }) },
  rqm: { id: 37, make: rqm },
  'kmeans-auto': { id: 38, make: kmeansAuto },
  ranks: { id: 39, make: ranks },
};
