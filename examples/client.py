"""Streams one answer: `python examples/client.py "Why is the sky blue?"` (the suite must be running)."""

import sys

import grpc

from tandem.api.v1 import generation_pb2, generation_pb2_grpc

question = sys.argv[1] if len(sys.argv) > 1 else "Why is the sky blue?"
request = generation_pb2.GenerateRequest(
    chat=generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role=generation_pb2.CHAT_ROLE_USER, content=question)]),
    sampling=generation_pb2.SamplingParams(temperature=0),
    stopping=generation_pb2.StoppingParams(max_tokens=64),
)
with grpc.insecure_channel("127.0.0.1:50051") as channel:
    for response in generation_pb2_grpc.GenerationServiceStub(channel).Generate(request, timeout=60):
        print(response.delta.text, end="", flush=True)
print()
