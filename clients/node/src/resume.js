// What a client that resumes knows of a generation, and what it asks for next. Free of I/O; `client.js` drives it.
//
// After a failure: attach again (Resume), which is cheap and possible where the server still lives; else go on with the
// tokens held (GenerateRequest.continuation), which any replica can do. The same policy as in the Python client.

import { randomBytes } from "node:crypto";

import grpc from "@grpc/grpc-js";

import { HeadraceError } from "./errors.js";

const { status } = grpc;

export const MAX_ATTEMPTS = 8; // failures in a row without a new message
const MAX_RESUMES = 3; // of those, calls of Resume
const FIRST_BACKOFF = 0.1; // seconds; the first try again comes at once
const MAX_BACKOFF = 5;

// What says that a connection, a proxy or a server broke, not the request. Envoy reports a killed server as INTERNAL,
// without a reason of ours.
const BROKEN = new Set([status.UNAVAILABLE, status.RESOURCE_EXHAUSTED]);
const BROKEN_WITHOUT_REASON = new Set([status.INTERNAL, status.UNKNOWN, status.CANCELLED, status.ABORTED]);
const FINAL_REASONS = new Set(["MODEL_FAILED", "TIME_LIMIT"]);
const NOT_KEPT_REASONS = new Set(["GENERATION_UNKNOWN", "OFFSET_NOT_KEPT", "OFFSET_AHEAD"]);

/** One generation, over all the calls that it takes. */
export class Progress {
  #request;
  #end; // milliseconds of performance.now(), or Infinity
  #tokenIds = [];
  #origin = null;
  #failures = 0;
  #resumes = 0;
  #isResuming = false;

  generationId = "";
  replica = ""; // as Envoy names it
  resumed = 0; // calls after the first
  isFinished = false;

  /** request: a GenerateRequest for one generation. timeout: seconds for all calls together, or undefined. */
  constructor(request, timeout) {
    if ((request.sampling.n ?? 1) > 1) throw new RangeError("resume is for one generation: n must be 1");
    const seed = request.sampling.seed ?? randomBytes(8).readBigUInt64LE().toString();
    this.#request = { ...request, sampling: { ...request.sampling, seed: String(seed) }, resumable: true };
    this.#end = timeout === undefined ? Infinity : performance.now() + timeout * 1000;
  }

  /** The first call: {method, request, delay}. delay: seconds. */
  first() {
    return { method: "generate", request: this.#request, delay: 0 };
  }

  /** The deadline of the next call, or undefined. */
  deadline() {
    return this.#end === Infinity ? undefined : new Date(Date.now() + Math.max(0, this.#end - performance.now()));
  }

  /** A message has come. Throws where tokens are missing or come twice. */
  take(chunk) {
    if (chunk.offset !== this.#tokenIds.length) {
      const message = `the stream goes on at token ${chunk.offset}, ${this.#tokenIds.length} are here`;
      throw new HeadraceError(status.DATA_LOSS, message);
    }
    this.#tokenIds.push(...chunk.tokenIds);
    this.generationId = chunk.generationId;
    this.#origin = chunk.origin ?? this.#origin;
    this.isFinished = chunk.finish !== null;
    this.#failures = 0;
    this.#resumes = 0;
  }

  /** What to do about a failure: the next call. Throws it where that is nothing. */
  after(error) {
    const isNotKept = this.#isResuming && NOT_KEPT_REASONS.has(error.reason);
    this.#failures += 1;
    const isOver = this.#failures >= MAX_ATTEMPTS || performance.now() >= this.#end;
    if (isOver || !(isNotKept || isBroken(error))) throw error;
    if (error.reason) this.#resumes = MAX_RESUMES; // it is gone, or its server would say so
    this.resumed += 1;
    this.#isResuming = this.generationId !== "" && this.#resumes < MAX_RESUMES;
    this.#resumes += Number(this.#isResuming);
    return { ...this.#next(), delay: isNotKept ? 0 : this.#delay(error) };
  }

  #next() {
    if (this.#isResuming) {
      const request = { generationId: this.generationId, nextOffset: this.#tokenIds.length };
      return { method: "resume", request };
    }
    this.replica = "";
    if (this.#origin === null) return { method: "generate", request: this.#request };
    const { promptHash, modelDigest, arithmetic, maxTokens } = this.#origin;
    const continuation = { tokenIds: this.#tokenIds.slice(), promptHash, modelDigest, arithmetic };
    const sampling = { ...this.#request.sampling, maxTokens };
    return { method: "generate", request: { ...this.#request, sampling, continuation } };
  }

  // At once the first time; then with a growing, random wait; never before the server wants to be asked again.
  #delay(error) {
    const doubled = FIRST_BACKOFF * 2 ** (this.#failures - 2);
    const backoff = this.#failures > 1 ? Math.min(doubled, MAX_BACKOFF) * (0.5 + Math.random()) : 0;
    return Math.max(backoff, error.retryAfter ?? 0);
  }
}

function isBroken(error) {
  if (FINAL_REASONS.has(error.reason)) return false;
  return BROKEN.has(error.code) || (BROKEN_WITHOUT_REASON.has(error.code) && !error.reason);
}
