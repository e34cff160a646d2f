// Frames of Roundtable: the header, the payload, and the table of stages. The format is docs/wire-format.md.

import { POSITION_CODERS, SYMBOL_CODERS } from './coders.mjs';
import { QUANTISERS } from './quantisers.mjs';
import { check, FrameError, Reader } from './reader.mjs';
import { SELECTORS } from './selectors.mjs';
import { COMPRESSORS } from './compressors.mjs';

export { FrameError };

const MAGIC = [0x52, 0x54, 0x46, 0x31];

/** The kinds of stages, in the order in which a pipeline has them, each with its stages by name. */
const nothing = () => ({}); // for a decoder to do
const KINDS = {
  clip: { clip: { id: 70, make: nothing } },
  noise: { 'gaussian-noise': { id: 71, make: nothing } },
  split: { 'per-tensor': { id: 10, make: nothing } },
  select: SELECTORS,
  quantise: QUANTISERS,
  positions: POSITION_CODERS,
  symbols: SYMBOL_CODERS,
  compress: COMPRESSORS,
};
const ORDER = Object.keys(KINDS);

/** Stages as in a job file: `[{ codec: 'top-k', fraction: 0.1 }, { codec: 'rice' }]`. */
export class Pipeline {
  constructor(stages) {
    this.ids = [];
    this.quantise = QUANTISERS.raw.make({});
    this.positions = POSITION_CODERS['fixed-positions'].make({});
    this.symbols = SYMBOL_CODERS['fixed-symbols'].make({});
    let last = -1;
    for (const { codec, ...parameters } of stages) {
      const kind = ORDER.find((name) => Object.hasOwn(KINDS[name], codec));
      if (kind === undefined) throw new TypeError(`${codec} is not a codec`);
      if (ORDER.indexOf(kind) <= last) throw new TypeError(`${codec} stands at the wrong place`);
      last = ORDER.indexOf(kind);
      this.ids.push(KINDS[kind][codec].id);
      this[kind] = KINDS[kind][codec].make(parameters);
    }
    this.sendsPositions = Boolean(this.quantise.drops || (this.select && !this.select.positions));
  }

  /**
   * Decode a frame of tensors with these numbers of values.
   *
   * @param {Uint8Array} frame
   * @param {number[]} sizes
   * @returns {Float32Array} all values, one tensor after the other, NaNs with their payloads
   * @throws {FrameError} if the frame is none of this pipeline and these sizes, or is not canonical
   */
  decode(frame, sizes) {
    const D = sizes.reduce((sum, size) => sum + size, 0);
    let reader = new Reader(frame);
    check(MAGIC.every((byte) => reader.byte() === byte), 'not a frame: it does not begin with RTF1');
    const count = reader.varint();
    check(count === this.ids.length, `the frame has ${count} stages, expected are ${this.ids.length}`);
    const ids = this.ids.map(() => reader.varint());
    check(String(ids) === String(this.ids), `the frame has the stages ${ids}, expected are ${this.ids}`);
    const declared = reader.varint();
    check(declared === D, `the frame has ${declared} values, expected are ${D}`);

    const parts = this.split ? sizes.filter((size) => size > 0) : [D];
    const most = parts.reduce((sum, size) => sum + this.maxBytes(size), 0);
    if (this.compress) reader = new Reader(this.compress.decompress(reader.take(reader.left), most));
    check(reader.left <= most, `a payload of ${reader.left} bytes, at most ${most} are possible`);
    const values = new Uint32Array(D);
    let start = 0;
    for (const size of parts) this.readPart(reader, values.subarray(start, (start += size)));
    reader.end();
    return new Float32Array(values.buffer);
  }

  /** The most bytes that the stages make of `size` values in one segment, or one tensor. */
  maxBytes(size) {
    const most = this.select ? this.select.most(size) : size;
    const note = this.sendsPositions ? 6 + this.positions.maxBytes(most, size) : (this.select?.noteBytes ?? 0);
    const codes = this.symbols.maxBytes(most, this.quantise.numCodes(most));
    const segment = note + this.quantise.tableBytes(most) + codes;
    if (!this.split) return segment;
    return 1 + (this.quantise.neverAsItIs ? segment : Math.min(segment, 4 * size));
  }

  /** Read one segment, or with `per-tensor` one tensor, into `values`. */
  readPart(reader, values) {
    const asItIs = this.split ? reader.byte() : 0;
    check(asItIs === 0 || (asItIs === 1 && !this.quantise.neverAsItIs), `${asItIs} before a tensor`);
    if (asItIs) values.set(reader.numbers(values.length, 32));
    else {
      const before = reader.left;
      this.readSegment(reader, values);
      const bytes = before - reader.left;
      check(!this.split || this.quantise.neverAsItIs || bytes <= 4 * values.length, `a tensor in ${bytes} bytes`);
    }
  }

  readSegment(reader, values) {
    const D = values.length;
    const most = this.select ? this.select.most(D) : D;
    let n = most;
    let positions = null;
    if (this.sendsPositions) {
      n = reader.varint();
      check(n <= most, `${n} values are sent, at most ${most} are possible`);
    } else if (this.select) {
      positions = this.select.positions(reader, D);
    }
    const table = this.quantise.open(reader, n);
    if (this.sendsPositions) {
      positions = this.positions.read(reader, n, D);
      check(positions.every((p, i) => i === 0 || positions[i - 1] < p), 'positions do not ascend');
      check(n === 0 || positions[n - 1] < D, `position ${positions[n - 1]} of ${D} values`);
    }
    const numCodes = this.quantise.numCodes(n);
    const codes = this.symbols.read(reader, n, numCodes);
    check(codes.every((code) => code < numCodes), `a code is not below ${numCodes}`);
    values.fill(table.rest ?? 0);
    codes.forEach((code, i) => (values[positions ? positions[i] : i] = table.bits(code, i)));
  }
}
