# SPDX-License-Identifier: Apache-2.0
"""Every vector as a seed of the fuzzer: fuzz/corpus/PROTOCOL/BY-NUMBER. Seeds of HTTP/1 are there by hand."""
import json
import pathlib

here = pathlib.Path(__file__).parent
for number, line in enumerate((here / "frames.jsonl").read_text().splitlines()):
    vector = json.loads(line)
    place = here.parent.parent / "fuzz" / "corpus" / vector["protocol"] / f"{vector['by']}-{number}"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(bytes.fromhex(vector["hex"]))
