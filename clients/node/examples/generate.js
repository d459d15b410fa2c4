// Streams one generation: text, or with --json one line per chunk.
//
//   node examples/generate.js 127.0.0.1:50051 '{"text": "Once upon a time"}' '{"maxTokens": 32}' [--resume] [--json]

import { Client } from "../src/index.js";

const flags = process.argv.slice(2).filter((argument) => argument.startsWith("--"));
const [target, prompt, sampling = "{}"] = process.argv.slice(2).filter((argument) => !argument.startsWith("--"));
const client = new Client(target);
try {
  const options = { resume: flags.includes("--resume") };
  for await (const chunk of client.generate(JSON.parse(prompt), JSON.parse(sampling), options)) {
    process.stdout.write(flags.includes("--json") ? `${JSON.stringify(chunk)}\n` : chunk.text);
  }
} catch (error) {
  process.stderr.write(`${error.message}\n`);
  process.exitCode = 1;
} finally {
  await client.close();
}
