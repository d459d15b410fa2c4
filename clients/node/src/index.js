// The Node client of Headrace: prompts in, chunks out, over one channel. What users import.
//
//   import { Client } from "headrace";
//   const client = new Client("127.0.0.1:50051");
//   for await (const chunk of client.generate({ text: "Once upon a time" }, { maxTokens: 32 }, { resume: true })) {
//     process.stdout.write(chunk.text);
//   }
//   client.close();

export { Client } from "./client.js";
export { HeadraceError } from "./errors.js";
