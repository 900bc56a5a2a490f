// Streams one answer: npm install && node client.mjs "Why is the sky blue?" (the suite must be running).
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const protos = fileURLToPath(new URL("../../protos", import.meta.url));
const definition = protoLoader.loadSync("tandem/api/v1/generation.proto", { includeDirs: [protos], keepCase: true, defaults: true, oneofs: true });
const { GenerationService } = grpc.loadPackageDefinition(definition).tandem.api.v1;

const client = new GenerationService("127.0.0.1:50051", grpc.credentials.createInsecure());
const stream = client.Generate({
  chat: { messages: [{ role: "CHAT_ROLE_USER", content: process.argv[2] ?? "Why is the sky blue?" }] },
  sampling: { temperature: 0 },
  stopping: { max_tokens: 64 },
});
stream.on("data", (response) => {
  if (response.event === "delta") process.stdout.write(response.delta.text);
});
stream.on("error", (error) => {
  console.error(`${error.code} ${error.details}`);
  process.exitCode = 1;
});
stream.on("end", () => console.log());
