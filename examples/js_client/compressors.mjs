// What is done to a whole payload. See "Other stages" in docs/wire-format.md.
//
// A compressor has `decompress(bytes, maxBytes)`, which returns a payload of at most that many bytes.

import { decompress } from './zstd.mjs';

export const COMPRESSORS = {
  zstd: {
    id: 60,
    make: ({ width = 4 }) => ({
      decompress(bytes, maxBytes) {
        const shuffled = decompress(bytes, maxBytes);
        const words = Math.floor(shuffled.length / width);
        const rest = words * width;
        return shuffled.map((byte, at) => (at < rest ? shuffled[(at % width) * words + Math.floor(at / width)] : byte));
      },
    }),
  },
};
