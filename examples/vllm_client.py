"""Compress passages to soft tokens in this process and let a server answer over HTTP.

    pip install nutgraf[serve]
    python examples/vllm_client.py [URL MODEL]

Without a URL it starts a server in this process. The server at a URL must serve the reader named below: ``nutgraf serve
--reader reader-smollm2``, or ``vllm serve READER --enable-prompt-embeds`` for your own reader.
"""

import sys
import threading
import time

import uvicorn
from nutgraf import Reader, load_compressor
from nutgraf.adapters.openai import EmbeddingTable, ServedReader
from nutgraf.adapters.serve import create_app
from shared import READER, SOFT, passages, questions


def start_server(reader: Reader) -> tuple[uvicorn.Server, str]:
    """``nutgraf serve --reader reader-smollm2`` in a thread."""
    server = uvicorn.Server(uvicorn.Config(create_app(reader), port=0, log_level="error"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    return server, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"


reader = Reader.from_pretrained(READER)
compressor = load_compressor(SOFT, reader)


if __name__ == "__main__":
    server, (url, model) = None, sys.argv[1:] or (None, reader.name)
    if url is None:
        server, url = start_server(reader)
    # Of the reader, the client needs its tokenizer and its token embeddings alone.
    table = EmbeddingTable.of(reader)  # elsewhere: EmbeddingTable.from_pretrained(FOLDER, fingerprint=...)
    texts = [node.text for node in passages()]
    texts = texts[:: max(len(texts) // len(questions()), 1)][: len(questions())]  # those that hold the answers
    compressed = compressor.compress(texts)
    prompts = [[passage, f"\n\nQuestion: {question}\nAnswer:"] for passage, question in zip(compressed, questions())]
    with ServedReader(url, model, table, fallback="text") as served:
        answers = served.generate(prompts, max_new_tokens=16, stop=["\n"], texts=[[text] for text in texts])
        for question, passage, answer in zip(questions(), compressed, answers):
            print(f"{question}\n  {passage.source_tokens} tokens read as {passage.slots} slots: {answer.strip()}")
        print("Streamed: ", end="")
        for piece in served.stream(prompts[0], max_new_tokens=16, stop=["\n"], texts=[texts[0]]):
            print(piece, end="", flush=True)
        print()
    if server is not None:
        server.should_exit = True
