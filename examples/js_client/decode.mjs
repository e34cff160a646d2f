// node decode.mjs FRAMES.json: decode golden frames and damaged ones. The entries are explained in
// compression/fedcodec/README.md; one whose `decoded` is null must be refused.

import { readFileSync } from 'node:fs';
import { FrameError, Pipeline } from './frame.mjs';

const DAMAGED_UP_TO = 512; // bytes of a frame that is tried with each truncation and each byte behind it

/** The patterns of what a frame decodes to, or null if it is refused; any other error passes. */
function attempt(pipeline, frame, sizes) {
  try {
    const values = pipeline.decode(frame, sizes);
    return Array.from(new Uint32Array(values.buffer), (bits) => bits.toString(16).padStart(8, '0'));
  } catch (error) {
    if (error instanceof FrameError) return null;
    throw error;
  }
}

/** Yield what is wrong about a golden frame, or one that is made of it. */
function* faults({ stages, sizes, decoded, frame }) {
  const pipeline = new Pipeline(stages);
  const bytes = Uint8Array.from(Buffer.from(frame, 'hex'));
  const expected = sizes ?? [decoded.length];
  const found = attempt(pipeline, bytes, expected);
  if (String(found) !== String(decoded)) yield `decodes to ${found}, expected is ${decoded}`;
  if (decoded === null || bytes.length > DAMAGED_UP_TO) return;
  for (let length = 0; length < bytes.length; length++) {
    if (attempt(pipeline, bytes.subarray(0, length), expected)) yield `its first ${length} bytes are not refused`;
  }
  for (let byte = 0; byte < 256; byte++) {
    if (attempt(pipeline, Uint8Array.of(...bytes, byte), expected)) yield `with a byte ${byte} it is not refused`;
  }
}

const frames = JSON.parse(readFileSync(process.argv[2], 'utf8'));
let failures = 0;
for (const golden of frames) {
  for (const fault of faults(golden)) {
    failures++;
    console.log(`${golden.about}: ${fault}`);
  }
}
console.log(`${frames.length} frames, ${failures} failures`);
process.exitCode = failures ? 1 : 0;
