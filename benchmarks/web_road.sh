#!/usr/bin/env bash
# The whole road of docs/web_pages.md on one machine, without the web: documents in the form of MMC4 -> urls.csv ->
# img2dataset -> tar shards -> 01 -> 02 -> 04 for a few steps -> 05. A server on 127.0.0.1 has OpenMoji's pictures, a page
# a row of the Unicode chart. Of 10 addresses one is gone, of 15 one is no image, of 20 one is refused by a header
# (noai), and of 8 one is shown again, one pixel aside: a near-duplicate.
#
#     python -m venv runs/img2dataset && runs/img2dataset/bin/pip install img2dataset     # an environment of its own
#     IMG2DATASET=runs/img2dataset/bin/img2dataset bash benchmarks/web_road.sh             # 75 s on two cores
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
img2dataset=${IMG2DATASET:-img2dataset}
work=${1:-runs/web_road}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} NO_ALBUMENTATIONS_UPDATE=1 WANDB_MODE=disabled no_proxy=127.0.0.1
rm -rf "$work"
mkdir -p "$work"

echo "== pictures, documents, server"
$python -m examples.openmoji --out "$work/site"
$python - "$work" <<'END' &
import http.server, json, sys
from pathlib import Path
from PIL import Image, ImageChops

work = Path(sys.argv[1])


class Handler(http.server.SimpleHTTPRequestHandler):
    def end_headers(self):
        if "noai" in self.path:
            self.send_header("X-Robots-Tag", "noai")
        super().end_headers()

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Handler(*a, directory=str(work / "site")))
documents, i = {}, 0
for path in sorted((work / "site").glob("*/*.png")):
    i += 1
    names = [path.name]
    if i % 10 == 0:
        path.unlink()
    elif i % 15 == 1:
        path.write_text("<html>moved</html>")
    elif i % 20 == 2:
        names = [path.rename(path.with_name("noai-" + path.name)).name]
    elif i % 8 == 3:
        names.append("again-" + path.name)
        ImageChops.offset(Image.open(path), 1, 0).save(path.with_name(names[1]))
    urls = [f"http://127.0.0.1:{server.server_port}/{path.parent.name}/{name}" for name in names]
    page = documents.setdefault(path.parent.name, [])
    page += [dict(image_name=n, raw_url=u, matched_text_index=0, matched_sim=0.3, face_detections=None)
             for n, u in zip(names, urls)]
with open(work / "docs.jsonl.partial", "w") as f:
    for name, images in documents.items():
        print(json.dumps(dict(url=f"http://127.0.0.1/{name}.html", text_list=[name], image_info=images,
                              similarity_matrix=[[0.3]] * len(images), could_have_url_duplicate=0)), file=f)
(work / "docs.jsonl.partial").rename(work / "docs.jsonl")
server.serve_forever()
END
server=$!
trap 'kill $server' EXIT
until [ -e "$work/docs.jsonl" ]; do kill -0 $server; sleep 1; done

echo "== web_pages, img2dataset"
$python -m examples.web_pages "$work/docs.jsonl" --pages 40 --out "$work/urls.csv"
"$img2dataset" --url_list "$work/urls.csv" --input_format csv --url_col url --save_additional_columns '["page"]' \
    --output_format webdataset --output_folder "$work/shards" --image_size 256 --resize_mode center_crop \
    --min_image_size 128 --max_aspect_ratio 3 --extract_exif False \
    --number_sample_per_shard 100 --processes_count 1 --thread_count 8 > "$work/img2dataset.log" 2>&1
for what in count successes failed_to_download failed_to_resize; do
    echo "$what: $(grep -h "\"$what\"" "$work"/shards/*_stats.json | tr -dc '0-9\n' | paste -sd+ | bc)"
done
ls "$work"/shards/*.tar | wc -l | xargs echo shards:

echo "== 01, 02, 04, 05"
$python 01_embed.py --images "$work/shards/*.tar" --preset emoji16 --encoder-px 128 --device cpu --out "$work/data"
$python 02_filter_pairs.py --data "$work/data"
$python 04_train_pairs.py --data "$work/data" --device cpu --batch 16 --steps 40
$python 05_sample.py --data "$work/data" --device cpu --sample-steps 4 --variations 2
