// Loads the contract at run time; nothing is generated. In a checkout it lies in protos/, in a package beside src/.

import { existsSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const here = dirname(fileURLToPath(import.meta.url));
const roots = [join(here, "..", "protos"), join(here, "..", "..", "..", "protos")];

/** The package headrace.v1. 64-bit numbers are strings, enums their names, absent messages null. */
export function loadContract() {
  const root = roots.find((folder) => existsSync(join(folder, "headrace", "v1", "inference.proto")));
  if (root === undefined) throw new Error("headrace/v1/inference.proto is neither in the package nor in a checkout");
  const definition = loader.loadSync("headrace/v1/inference.proto", {
    includeDirs: [root],
    keepCase: false,
    longs: String,
    enums: String,
    defaults: true,
    oneofs: true,
  });
  return grpc.loadPackageDefinition(definition).headrace.v1;
}
