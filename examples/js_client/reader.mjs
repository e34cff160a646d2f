// Reading bytes that somebody else wrote. See "Numbers" in docs/wire-format.md.

/** A frame that is damaged, is not canonical, or was written by other stages or for another number of values. */
export class FrameError extends Error {
  name = 'FrameError';
}

/** Throw FrameError with the message, unless the condition holds. */
export function check(condition, message) {
  if (!condition) throw new FrameError(message);
}

/** Bytes, read from the first to the last. */
export class Reader {
  constructor(bytes) {
    this.bytes = bytes;
    this.at = 0;
  }

  get left() {
    return this.bytes.length - this.at;
  }

  take(count) {
    check(count <= this.left, `the frame ends too early: ${count} bytes are wanted and ${this.left} are left`);
    return this.bytes.subarray(this.at, (this.at += count));
  }

  byte() {
    return this.take(1)[0];
  }

  /** An unsigned number of so many bytes, exact below 2^53. */
  number(count) {
    return this.take(count).reduceRight((number, byte) => number * 256 + byte, 0);
  }

  /** Up to 42 bits, so within the integers that a double has. */
  varint() {
    let number = 0;
    for (let digits = 0; digits < 6; digits++) {
      const byte = this.byte();
      number += (byte & 0x7f) * 128 ** digits;
      if (byte < 0x80) {
        check(byte !== 0 || digits === 0, 'a varint is longer than needed');
        return number;
      }
    }
    throw new FrameError('a varint has more than 6 bytes');
  }

  /** A bit string of `count` numbers of `width` bits; nothing is allocated before it is clear that they are there. */
  numbers(count, width) {
    check(count * width <= this.left * 8, `the frame ends too early: ${count} numbers of ${width} bits are wanted`);
    const bits = new Bits(this);
    const numbers = Uint32Array.from({ length: count }, () => bits.number(width));
    bits.end();
    return numbers;
  }

  end() {
    check(this.left === 0, `the frame goes on for ${this.left} bytes after its end`);
  }
}

/** A bit string that begins at the reader's next byte. */
export class Bits {
  constructor(reader) {
    this.reader = reader;
    this.byte = 0;
    this.unread = 0; // bits of `byte`, which are its upper ones
  }

  number(width) {
    let number = 0;
    for (let have = 0; have < width; ) {
      if (this.unread === 0) [this.byte, this.unread] = [this.reader.byte(), 8];
      const count = Math.min(this.unread, width - have);
      number += (this.byte & ((1 << count) - 1)) * 2 ** have;
      this.byte >>= count;
      this.unread -= count;
      have += count;
    }
    return number;
  }

  end() {
    check(this.byte === 0, 'a bit string is not filled up with zero bits');
    this.unread = 0;
  }
}

/** The number of bits that tell `count` things apart: the binary logarithm, rounded up. */
export function widthOf(count) {
  let width = 0;
  while (2 ** width < count) width++;
  return width;
}
