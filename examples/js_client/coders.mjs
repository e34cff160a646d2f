// How positions and codes are written. See "Stages that write positions" and "… codes" in docs/wire-format.md.
//
// A coder of positions has `maxBytes(n, D)` and `read(reader, n, D)`, one of codes `maxBytes(n, numCodes)` and
// `read(reader, n, numCodes)`; both return n numbers, which the caller checks to be ascending or below `numCodes`.

import { Bits, check, widthOf } from './reader.mjs';

const fixed = {
  maxBytes: (n, count) => Math.ceil((n * widthOf(count)) / 8),
  read: (reader, n, count) => reader.numbers(n, widthOf(count)),
};

const rice = {
  maxBytes: (n, D) => 1 + Math.ceil(D / 8), // the shortest is no longer than that of w = 0, a bit for each position
  read(reader, n) {
    const w = reader.byte();
    check(w < 32, `${w} bits of a gap, at most 31 are possible`);
    check(n * (w + 1) <= reader.left * 8, `the frame ends too early for ${n} gaps`);
    const bits = new Bits(reader);
    const gaps = Float64Array.from({ length: n }, () => {
      let ones = 0;
      while (bits.number(1)) ones++;
      return ones * 2 ** w + bits.number(w);
    });
    bits.end();
    const lengths = Array.from({ length: 32 }, (_, v) =>
      gaps.reduce((sum, gap) => sum + Math.floor(gap / 2 ** v), n * (v + 1)),
    );
    const best = lengths.indexOf(Math.min(...lengths));
    check(w === best, `gaps are written with ${w} bits, and with ${best} they are shortest`);
    let before = -1;
    return gaps.map((gap) => (before += gap + 1));
  },
};

const RUN = 1024; // codes
const LONGEST = 15; // bits of a word

const huffman = {
  maxBytes(n, numCodes) {
    const runs = Math.ceil((14 * Math.ceil(n / RUN)) / 8);
    return Math.ceil(numCodes / 2) + runs + Math.ceil((n * LONGEST) / 8);
  },
  read(reader, n, numCodes) {
    const lengths = reader.numbers(numCodes, 4);
    const order = [...lengths.keys()].filter((code) => lengths[code]).sort((a, b) => lengths[a] - lengths[b] || a - b);
    let codes;
    if (order.length > 1) {
      const sum = order.reduce((total, code) => total + 2 ** -lengths[code], 0);
      check(sum === 1, `the words fill ${sum} of the tree`);
      codes = readWords(reader, n, lengths, order);
    } else {
      codes = new Uint32Array(n).fill(order[0]);
    }
    const counts = new Array(numCodes).fill(0);
    for (const code of codes) counts[code]++;
    const best = wordLengths(counts);
    const canonical = lengths.every((length, code) => length === best[code]);
    check(canonical, 'the lengths of words are not those of package-merge');
    return codes;
  },
};

/** Read the words of n codes, of which those in `order`, that of their words, occur. */
function readWords(reader, n, lengths, order) {
  const runs = reader.numbers(Math.ceil(n / RUN), 14);
  const ofLength = new Array(LONGEST + 1).fill(0);
  for (const code of order) ofLength[lengths[code]]++;
  check(n <= reader.left * 8, `the frame ends too early for ${n} words`);
  const bits = new Bits(reader);
  const codes = new Uint32Array(n);
  for (const [run, declared] of runs.entries()) {
    let used = 0;
    for (let i = run * RUN; i < Math.min(n, (run + 1) * RUN); i++) {
      let word = 0; // counted from the first word of its length
      let before = 0; // words that are shorter
      for (let length = 1; ; length++) {
        word = 2 * word + bits.number(1);
        used++;
        if (word < ofLength[length]) {
          codes[i] = order[before + word];
          break;
        }
        word -= ofLength[length];
        before += ofLength[length];
      }
    }
    check(used === declared, `the words of run ${run} take ${used} bits and not ${declared}`);
  }
  bits.end();
  return codes;
}

/** The lengths of package-merge for the counts of codes; 0 for those that do not occur. */
function wordLengths(counts) {
  const lengths = new Array(counts.length).fill(0);
  const codes = counts.flatMap((count, code) => (count ? [{ count, code }] : [])).sort((a, b) => a.count - b.count);
  if (codes.length < 2) {
    for (const { code } of codes) lengths[code] = 1;
    return lengths;
  }
  const lists = [codes];
  while (lists.length < LONGEST) {
    const list = lists.at(-1);
    const packages = list.flatMap(({ count }, i) => (i % 2 ? [{ count: list[i - 1].count + count }] : []));
    lists.push([...codes, ...packages].sort((a, b) => a.count - b.count)); // a stable sort
  }
  let taken = 2 * codes.length - 2;
  for (const list of lists.reverse()) {
    const entries = list.slice(0, taken);
    for (const { code } of entries) if (code !== undefined) lengths[code]++;
    taken = 2 * entries.filter(({ code }) => code === undefined).length;
  }
  return lengths;
}

export const POSITION_CODERS = {
  'fixed-positions': { id: 40, make: () => fixed },
  rice: { id: 41, make: () => rice },
};

export const SYMBOL_CODERS = {
  'fixed-symbols': { id: 50, make: () => fixed },
  huffman: { id: 51, make: () => huffman },
};
