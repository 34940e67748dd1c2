"""Write the table `url, page` that img2dataset fetches, from documents of MMC4 or OBELICS (see docs/web_pages.md).

Reads   FILES: MMC4's .jsonl or .jsonl.zip (url; image_info: raw_url, face_detections); OBELICS' .parquet, which needs
        pyarrow, or the same rows as .jsonl (images: addresses and nulls; general_metadata: JSON with the page's url)
Writes  OUT, a .csv. The rows of a page stand together, each address once. Pages with fewer than two are left out, and
        images with faces, where the set marks them. Pages are in the order of a hash. In the order of their names, all
        requests of a while would go to one site.

    python -m examples.web_pages mmc4/*.jsonl --out urls.csv
    python -m examples.web_pages obelics/train-000*.parquet --pages 10000 --out urls.csv         # a random part
"""
import argparse
import csv
import hashlib
import json
import zipfile
from pathlib import Path

import common


def documents(path):
    """The rows of a file, a dictionary each."""
    if path.suffix == ".parquet":
        from pyarrow.parquet import ParquetFile
        for batch in ParquetFile(path).iter_batches(columns=["images", "general_metadata"]):
            yield from batch.to_pylist()
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                yield from map(json.loads, archive.open(name))
    else:
        yield from map(json.loads, path.open("rb"))


def addresses(document):
    """(page, [address of an image]) of a document."""
    if "image_info" in document:                                       # MMC4
        return document["url"], [i["raw_url"] for i in document["image_info"] if not i.get("face_detections")]
    return json.loads(document["general_metadata"])["url"], document["images"]           # OBELICS: null is a paragraph


p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("files", type=Path, nargs="+")
p.add_argument("--pages", type=common.count, help="write at most so many pages")
p.add_argument("--out", type=Path, default=Path("urls.csv"), help="table to write (%(default)s)")
args = p.parse_args()
pages = {}                                                             # {page: {address: None}}, in their order
for path in args.files:
    try:
        for page, urls in map(addresses, documents(path)):
            pages.setdefault(page, {}).update((url, None) for url in urls if url and not set(url) & set(" \r\n"))
    except (OSError, ValueError, LookupError, TypeError) as e:
        common.die(f"{path} has no documents of MMC4 or OBELICS ({type(e).__name__}: {e})")
kept = sorted((page for page in pages if len(pages[page]) > 1), key=lambda page: hashlib.sha1(page.encode()).digest())
kept = kept[:args.pages]
rows = [(url, page) for page in kept for url in pages[page]]
with args.out.open("w", encoding="utf-8", newline="") as f:
    csv.writer(f).writerows([("url", "page"), *rows])
print(f"wrote {args.out}: {len(rows)} images on {len(kept)} of {len(pages)} pages; next: docs/web_pages.md")
