// Failures of calls: gRPC's status, and the stable reason that Headrace puts into google.rpc.Status details.

import grpc from "@grpc/grpc-js";
import protobuf from "protobufjs";

// The parts of google/rpc/status.proto and error_details.proto that are read here.
const { root } = protobuf.parse(`
  syntax = "proto3";
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message ErrorInfo { string reason = 1; string domain = 2; }
  message Duration { int32 seconds = 1; int32 nanos = 2; }
  message RetryInfo { Duration retry_delay = 1; }
`);
const [Status, ErrorInfo, RetryInfo] = ["Status", "ErrorInfo", "RetryInfo"].map((name) => root.lookupType(name));

/** What a server, or the way to it, answered instead of a result.
 *  code: a grpc.status. reason: from docs/API.md, "" where it is not Headrace's. retryAfter: seconds, or null. */
export class HeadraceError extends Error {
  constructor(code, message, { reason = "", retryAfter = null } = {}) {
    super(`${grpc.status[code]}${reason ? ` (${reason})` : ""}: ${message}`);
    this.name = "HeadraceError";
    this.code = code;
    this.reason = reason;
    this.retryAfter = retryAfter;
  }
}

/** From what grpc-js raises. */
export function fromServiceError(error) {
  const facts = {};
  try {
    for (const bytes of error.metadata?.get("grpc-status-details-bin") ?? []) {
      for (const detail of Status.decode(bytes).details) {
        if (detail.typeUrl.endsWith("google.rpc.ErrorInfo")) facts.reason = ErrorInfo.decode(detail.value).reason;
        if (detail.typeUrl.endsWith("google.rpc.RetryInfo")) {
          const delay = RetryInfo.decode(detail.value).retryDelay;
          facts.retryAfter = delay.seconds + delay.nanos / 1e9;
        }
      }
    }
  } catch {
    // A proxy's or another server's bytes; the plain status still says something.
  }
  return new HeadraceError(error.code ?? grpc.status.UNKNOWN, error.details ?? String(error), facts);
}
