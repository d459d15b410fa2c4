// The policy by itself: what is asked for after a failure. Run with `npm test`; tests/clients/test_node.py runs it too.

import assert from "node:assert/strict";
import { test } from "node:test";

import grpc from "@grpc/grpc-js";

import { HeadraceError } from "../src/errors.js";
import { MAX_ATTEMPTS, Progress } from "../src/resume.js";

const { status } = grpc;
const origin = { promptHash: "p", modelDigest: "m", arithmetic: "a", maxTokens: 9 };
const chunk = (offset, ...tokenIds) => ({
  offset,
  tokenIds,
  generationId: "g",
  origin: offset === 0 ? origin : null,
  finish: null,
});
const progress = () => new Progress({ prompt: { text: "x" }, sampling: {} });
const gone = (facts) => new HeadraceError(status.UNAVAILABLE, "gone", facts);

test("first the same generation, then the tokens held", () => {
  const one = progress();
  one.take(chunk(0, 1, 2));
  one.take(chunk(2, 3));
  assert.deepEqual(one.after(gone()), { method: "resume", request: { generationId: "g", nextOffset: 3 }, delay: 0 });
  const ask = one.after(new HeadraceError(status.NOT_FOUND, "?", { reason: "GENERATION_UNKNOWN" }));
  assert.equal(ask.method, "generate");
  assert.deepEqual(ask.request.continuation.tokenIds, [1, 2, 3]);
  assert.equal(ask.request.sampling.seed, one.first().request.sampling.seed);
  assert.equal(ask.delay, 0);
});

test("a server's own refusals are final, a broken stream is not", () => {
  progress().after(new HeadraceError(status.INTERNAL, "Received RST_STREAM with code 2"));
  for (const [code, reason] of [
    [status.INTERNAL, "NUMERIC"],
    [status.ABORTED, "SUPERSEDED"],
    [status.FAILED_PRECONDITION, "PROMPT_DIFFERS"],
    [status.NOT_FOUND, "GENERATION_UNKNOWN"],
  ]) {
    assert.throws(() => progress().after(new HeadraceError(code, "no", { reason })), HeadraceError);
  }
});

test("tries are bounded, pushback is obeyed", () => {
  const one = progress();
  assert.equal(one.after(gone({ reason: "OVERLOADED", retryAfter: 3 })).delay, 3);
  for (let count = 2; count < MAX_ATTEMPTS; count += 1) one.after(gone());
  assert.throws(() => one.after(gone()), HeadraceError);
});

test("a gap or a token twice is an error", () => {
  for (const offset of [0, 2]) {
    const one = progress();
    one.take(chunk(0, 1));
    assert.throws(() => one.take(chunk(offset, 2)), /DATA_LOSS/);
  }
});

test("resuming is for one generation", () => {
  assert.throws(() => new Progress({ sampling: { n: 2 } }), RangeError);
});
