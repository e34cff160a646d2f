// Which values are sent. See "Selecting stages" in docs/wire-format.md.
//
// A selector has `most(D)`, how many values it keeps at most. One whose positions are not sent has `noteBytes` and
// `positions(reader, D)`, which reads the note.

const kept = (fraction, D) => Math.ceil(fraction * D);

export const SELECTORS = {
  'top-k': {
    id: 20,
    make: ({ fraction = 0.01 }) => ({ most: (D) => kept(fraction, D) }),
  },
  threshold: {
    id: 21,
    make: () => ({ most: (D) => D }),
  },
  'rand-k': {
    id: 22,
    make: ({ fraction = 0.1 }) => ({
      most: (D) => kept(fraction, D),
      noteBytes: 8,
      positions(reader, D) {
        const seed = BigInt(reader.number(4)) + (BigInt(reader.number(4)) << 32n);
        const hashes = BigUint64Array.from({ length: D }, (_, i) => splitmix64(seed + BigInt(i)));
        const largest = hashes.slice().sort()[kept(fraction, D) - 1]; // all hashes are different
        return Uint32Array.from(hashes.keys()).filter((i) => hashes[i] <= largest);
      },
    }),
  },
};

function splitmix64(x) {
  let z = BigInt.asUintN(64, x + 0x9e3779b97f4a7c15n);
  z = BigInt.asUintN(64, (z ^ (z >> 30n)) * 0xbf58476d1ce4e5b9n);
  z = BigInt.asUintN(64, (z ^ (z >> 27n)) * 0x94d049bb133111ebn);
  return z ^ (z >> 31n);
}
