"""`python -m gateway.token_ids --model NAME < TEXT`: the text's tokens as a line of JSON, as the model's tokenizer makes them."""

import argparse
import json
import sys

from gateway.served_model import load_served_model
from tandem.models import ModelError, cache_directory, resolve_model


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the token ids of the text on standard input.")
    parser.add_argument("--model", required=True)
    arguments = parser.parse_args()
    try:
        model = load_served_model(resolve_model(arguments.model), cache_directory())
    except ModelError as error:
        sys.exit(str(error))
    text = sys.stdin.buffer.read().decode("utf-8", "replace")
    print(json.dumps(model.tokenizer.encode(text, add_special_tokens=True)))


if __name__ == "__main__":
    main()
