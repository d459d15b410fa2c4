// `Client`: one channel to a server or a mesh. Plain values in and out; the contract is protos/headrace/v1.

import { setTimeout as sleep } from "node:timers/promises";

import grpc from "@grpc/grpc-js";

import { fromServiceError } from "./errors.js";
import { loadContract } from "./protos.js";
import { Progress } from "./resume.js";

// Envoy's stateful session filter names the replica in this header of a response; sent back, it leads there again.
const REPLICA_KEY = "headrace-replica";
const CANCEL_MILLISECONDS = 2000; // for telling a server that a generation is not wanted any more
const MAX_MESSAGE_BYTES = 64 * 1024 * 1024;
const ROLES = { system: "ROLE_SYSTEM", user: "ROLE_USER", assistant: "ROLE_ASSISTANT", tool: "ROLE_TOOL" };

// A refused call (nothing admitted yet) is tried again; the server's pushback is obeyed.
const SERVICE_CONFIG = {
  methodConfig: [
    {
      name: [{ service: "headrace.v1.InferenceService" }],
      retryPolicy: {
        maxAttempts: 4,
        initialBackoff: "0.2s",
        maxBackoff: "5s",
        backoffMultiplier: 2,
        retryableStatusCodes: ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
      },
    },
  ],
  loadBalancingConfig: [{ round_robin: {} }],
};

export class Client {
  #stub;
  #model;
  #metadata;
  #cancels = new Set();

  /** target: a gRPC target, "host:port". credentials: grpc.ChannelCredentials, plain text by default.
   *  metadata: an object that goes with every call. */
  constructor(target, { model = "", credentials = grpc.credentials.createInsecure(), metadata = {} } = {}) {
    const { InferenceService } = loadContract();
    this.#stub = new InferenceService(target, credentials, {
      "grpc.keepalive_time_ms": 30_000,
      "grpc.keepalive_timeout_ms": 10_000,
      "grpc.max_receive_message_length": MAX_MESSAGE_BYTES,
      "grpc.service_config": JSON.stringify(SERVICE_CONFIG),
    });
    this.#model = model;
    this.#metadata = metadata;
  }

  /** Streams the continuation of a prompt as chunks: {index, offset, tokenIds, text, logprobs, finish, generationId}.
   *
   *  prompt: {text}, {messages: [{role, content}]} or {tokenIds}. sampling: the fields of headrace.v1.SamplingParams in
   *  camel case. timeout: seconds. With resume, a broken connection or a server that dies is not seen: the generation
   *  goes on, here or on another replica, with the very tokens that it would have had; timeout is then for all calls.
   *  Leaving the loop early cancels the generation. Throws HeadraceError. */
  async *generate(prompt, sampling = {}, { resume = false, timeout, label = "", cacheSalt = "" } = {}) {
    const request = { model: this.#model, prompt: toPrompt(prompt), sampling, requestLabel: label, cacheSalt };
    if (resume) yield* this.#resumed(new Progress(request, timeout));
    else {
      const deadline = timeout === undefined ? undefined : new Date(Date.now() + timeout * 1000);
      yield* this.#chunks(this.#stub.generate(request, this.#headers(""), { deadline }));
    }
  }

  /** Closes the channel, once the servers know of what was cancelled. */
  async close() {
    await Promise.all(this.#cancels);
    this.#stub.close();
  }

  async *#resumed(progress) {
    let ask = progress.first();
    try {
      while (!progress.isFinished) {
        if (ask.delay > 0) await sleep(ask.delay * 1000);
        const options = { deadline: progress.deadline() };
        const call = this.#stub[ask.method](ask.request, this.#headers(progress.replica), options);
        call.on("metadata", (headers) => {
          const [replica] = headers.get(REPLICA_KEY);
          if (replica !== undefined) progress.replica = String(replica);
        });
        let failure = { code: grpc.status.UNAVAILABLE, details: "the stream ended before the generation did" };
        try {
          for await (const { chunk } of messages(call)) {
            progress.take(chunk);
            yield toChunk(chunk);
          }
          if (progress.isFinished) return;
        } catch (error) {
          if (!(error instanceof CallError)) throw error;
          failure = error.cause;
        }
        ask = progress.after(fromServiceError(failure));
      }
    } finally {
      if (!progress.isFinished && progress.generationId) this.#cancel(progress);
    }
  }

  async *#chunks(call) {
    try {
      for await (const { chunk } of messages(call)) yield toChunk(chunk);
    } catch (error) {
      throw error instanceof CallError ? fromServiceError(error.cause) : error;
    }
  }

  // The end of a call does not cancel a resumable generation: its server cannot tell it from a broken connection.
  #cancel(progress) {
    const options = { deadline: Date.now() + CANCEL_MILLISECONDS };
    const told = new Promise((resolve) => {
      this.#stub.cancel({ generationId: progress.generationId }, this.#headers(progress.replica), options, resolve);
    });
    this.#cancels.add(told);
    told.finally(() => this.#cancels.delete(told));
  }

  #headers(replica) {
    const headers = new grpc.Metadata();
    for (const [key, value] of Object.entries(this.#metadata)) headers.set(key, value);
    if (replica) headers.set(REPLICA_KEY, replica);
    return headers;
  }
}

/** A failure of the call itself; whatever else is thrown while it is read is somebody else's. */
class CallError extends Error {}

async function* messages(call) {
  const iterator = call[Symbol.asyncIterator]();
  try {
    for (;;) {
      let step;
      try {
        step = await iterator.next();
      } catch (error) {
        throw new CallError("the call failed", { cause: error });
      }
      if (step.done) return;
      yield step.value;
    }
  } finally {
    call.on("error", () => {}); // of the cancellation below
    call.cancel();
  }
}

function toPrompt({ text, messages: turns, tokenIds }) {
  const forms = [text, turns, tokenIds].filter((form) => form !== undefined);
  if (forms.length !== 1) throw new TypeError("a prompt has exactly one of text, messages and tokenIds");
  if (text !== undefined) return { text };
  if (tokenIds !== undefined) return { tokens: { ids: tokenIds } };
  return { chat: { messages: turns.map(({ role, content }) => ({ role: toRole(role), content })) } };
}

function toRole(role) {
  if (!(role in ROLES)) throw new TypeError(`unknown role ${role}: use one of ${Object.keys(ROLES).join(", ")}`);
  return ROLES[role];
}

function toChunk({ index, offset, tokenIds, text, logprobs, finish, generationId }) {
  return { index, offset, tokenIds, text, logprobs, finish: finish && toFinish(finish), generationId };
}

function toFinish(finish) {
  return { ...finish, reason: finish.reason.replace("FINISH_REASON_", "").toLowerCase() };
}
