"""The data: COCO captions, MVSA posts, splits, the feature cache, the toy world, downloads.

    python data.py toy DIR                      write toy data in the official layouts: DIR/coco and DIR/mvsa
    python data.py check --coco DIR --mvsa DIR  look for both, and say what is missing and where to get it
    python data.py coco DIR --images 10000      fetch COCO's captions and its first 10,000 images (0: all)
    python data.py weights DIR --preset small   fetch f_I's weights
"""
import argparse
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import struct
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from http.client import HTTPException
from itertools import chain, pairwise
from multiprocessing.pool import ThreadPool
from pathlib import Path
from urllib.parse import quote
from urllib.request import Request, urlopen
from zipfile import BadZipFile, ZipFile

import numpy as np
import timm.data
import torch
from PIL import Image, ImageOps
from scipy.cluster.hierarchy import DisjointSet
from sklearn.model_selection import StratifiedGroupKFold, train_test_split
from tqdm import tqdm
from tqdm.utils import ObjectWrapper

from model import OUT_OF_MEMORY, PRESETS, ImageEncoder, UserError

LABELS = ("positive", "neutral", "negative")  # in CLMLF's order: emotion_label 0, 1, 2
CAPTIONS = "annotations/captions_train2017.json"
COCO_HELP = "name its folder with --coco, or run `make coco COCO=DIR`, which fetches it from cocodataset.org"
MVSA_HELP = ("MVSA must be downloaded by hand: www.mcrlab.net/research/mvsa-sentiment-analysis-on-multi-view-"
             "social-data/ or, on Kaggle, vincemarcs/mvsasingle and vincemarcs/mvsamultiple")

# ---- What all commands share: options, errors, files -------------------------------------------------------


def number(kind, least, most=sys.float_info.max):
    """add_argument's type and metavar for a number from `least` to `most`; not for nan or infinity."""
    def parse(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not in the range {shown}")
        return value
    shown = f"{least}.." if most == sys.float_info.max else f"{least}..{most}"
    parse.__name__ = kind.__name__  # argparse: "invalid float value"
    return {"type": parse, "metavar": shown}


class Unbreakable(ObjectWrapper):
    """A text stream that ends no run: silent once its pipe is closed, ? for what its encoding lacks."""

    def write(self, text):
        encoding = self.encoding or "utf-8"
        try:
            self._wrapped.write(text.encode(encoding, "replace").decode(encoding))
            self.flush()
        except OSError:  # a closed pipe, a lost terminal, a full disk
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


def run_command(command, memory):
    """command() -> its exit code, or after a sentence 2 for what the user can mend (`memory`: the options to
    lower), 1 for a loss that is not finite, 130 for Ctrl-C."""
    nowhere = open(os.devnull, "w")  # for a process that was started without an output
    out, err = Unbreakable(sys.stdout or nowhere), Unbreakable(sys.stderr or nowhere)
    code = 2
    with redirect_stdout(out), redirect_stderr(err):
        try:
            return command() or 0
        except UserError as error:
            text = error
        except FloatingPointError as error:
            code, text = 1, error
        except KeyboardInterrupt:
            code, text = 130, "interrupted; the cache, the last checkpoint and finished seeds are kept"
        except OSError as error:
            text = (f"{error.filename or 'a file'} cannot be written or read: {error.strerror or error}; "
                    "mend it, or name another folder (--out, --cache)")
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not re.search(OUT_OF_MEMORY, str(error)):
                raise
            text = f"out of memory; lower {memory}\n  ({str(error)[:200]})"
        print(f"error: {text}", file=sys.stderr)
        return code


@contextmanager
def locked(folder, wait=False):
    """Make a folder and hold its lock, which any end of the process frees. If taken, wait or UserError."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise UserError(f"another run writes to {folder}: wait, or name another folder") from None
            print(f"waiting for another process that is writing to {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def atomic_write(path, content):
    """Write these bytes to `path` by way of `path`.tmp: it is never half written."""
    part = path.with_name(path.name + ".tmp")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)  # it would be in the way on a full disk, which does not name the file
        error.filename = error.filename or str(path)
        raise


def write_json(path, content):
    """`content` as JSON, atomically. Raises ValueError for a number that is not finite."""
    atomic_write(path, json.dumps(content, indent=1, allow_nan=False).encode())


@contextmanager
def timed(seconds, stage):
    """Add the seconds that the block takes to the Counter `seconds`, under this name."""
    start = time.time()
    yield
    seconds[stage] += time.time() - start


def digest(*contents):
    """A hash of bytes and of what JSON can hold, as 32 hexadecimal digits."""
    parts = [content if isinstance(content, bytes) else json.dumps(content).encode() for content in contents]
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def read_file(path):
    """The bytes of a regular file, or None if it cannot be opened or is none (a pipe would never end)."""
    with suppress(OSError):
        return path.read_bytes() if path.is_file() else None


def read_ahead(load, keys):
    """load(key) for each key, the next one in a thread while the caller computes."""
    with ThreadPoolExecutor(1) as reader:
        results = (reader.submit(load, key) for key in keys)
        for result, _ in pairwise(chain(results, [None])):  # the next one is submitted before this is given
            yield result.result()


def describe(counts):
    """{what: how many} in words."""
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "none"


# ---- Images, and COCO's captions ---------------------------------------------------------------------------

# What Pillow raises on files that are not the image they claim to be
NOT_AN_IMAGE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error,
                Image.DecompressionBombError)


def image_transform(data_config):
    """PIL image -> [3, H, W]; squashed, as in the authors' scripts: captions are about the edges, too."""
    return timm.data.create_transform(**data_config, crop_pct=1.0, crop_mode="squash")


def read_image(path, size=None):
    """Path -> upright RGB image, or one of NOT_AN_IMAGE if it cannot be decoded whole. A JPEG of more than
    twice `size` (height, width) is decoded at a half, quarter or eighth, which costs a fraction."""
    if not Path(path).is_file():
        raise FileNotFoundError(errno.ENOENT, "not a file", str(path))
    with Image.open(path) as image:
        if size:
            image.draft(None, (2 * max(size), 2 * max(size)))  # does nothing for other formats
        image.load()
        with suppress(*NOT_AN_IMAGE, LookupError, TypeError):  # a picture can be good, its EXIF part corrupt
            image.getexif()  # it is kept; of the raw bytes exif_transpose would write a copy,
            image.info.pop("exif", None)  # which any corrupt field stops
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits a pixel: Pillow's own conversion would clip at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")


def parse_captions(content, name):
    """The bytes of caption file `name` -> ({image id: file name}, {image id: captions}), or UserError."""
    try:
        parsed = json.loads(content)
        images = [(image["id"], image["file_name"]) for image in parsed["images"]]
        notes = [(note["image_id"], note["caption"].strip()) for note in parsed["annotations"]]
        for number, text in images + notes:
            if type(number) is not int or type(text) is not str:  # in Python 1 == 1.0 == True
                raise TypeError("an id that is no whole number, or a file name or caption that is no text")
            text.encode()  # raises for half of a surrogate pair, which no tokenizer takes
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{name} is not a COCO caption file: {error!r}; {COCO_HELP}") from error
    files, captions = dict(images), {}
    if not len(images) == len(files) == len(set(files.values())):
        raise UserError(f"{name} lists an image id or a file name twice")
    for image, caption in notes:
        captions.setdefault(image, []).append(caption)
    return files, captions


def load_coco(root, limit=0):
    """COCO 2017 below `root` -> items [(path, captions)] by image id, the first `limit` of them or all, and a
    Counter of what cannot be used. UserError if nothing is left."""
    folder, annotations = Path(root) / "train2017", Path(root) / CAPTIONS
    missing = [str(folder)] * (not folder.is_dir()) + [str(annotations)] * (not annotations.is_file())
    if missing:
        raise UserError(f"COCO 2017 not found: looked for {' and '.join(missing)}\n  {COCO_HELP}")
    files, captions = parse_captions(annotations.read_bytes(), annotations)
    on_disk = {path.name for path in folder.iterdir()}
    there = {image: folder / name for image, name in sorted(files.items()) if name in on_disk}
    items = [(path, captions[image]) for image, path in there.items() if image in captions]
    skipped = Counter({"captioned image not listed": len(captions.keys() - files.keys()),
                       "image not on disk": len(files) - len(there),
                       "image without caption": len(there) - len(items)})
    if not items:
        raise UserError(f"no image of {folder} has a caption in {annotations}; skipped: {describe(skipped)}")
    return items[:limit or None], +skipped  # without zeros


def default_held_out(images):
    """How many of so many images to hold out: 100, or a tenth if that is less."""
    return min(100, max(2, images // 10))


def hold_out(cache, count):
    """Indices of the readable images to train on and of the `count` to measure on (0: the default): those
    whose hashed file names come first, so that an image that is lost moves no other."""
    count = count or default_held_out(len(cache.readable))
    if not 1 < count < len(cache.readable):
        raise UserError(f"--held_out {count} of {len(cache.readable)} readable images: at least 2, not all")
    order = sorted(cache.readable, key=lambda i: digest(cache.items[i][0].name))
    return np.sort(order[count:]), np.sort(order[:count])


def epoch_order(cache, train, seed, epoch):
    """One epoch: (images `train` in a new order, the number of a random caption of each). It has no state."""
    rng = np.random.default_rng([seed, epoch])
    images = rng.permutation(train)
    return images, rng.integers(cache.first[images], cache.first[images + 1])


# ---- The feature cache: f_I and f_T are frozen and pictures are not augmented, so each is encoded once -----

ENCODE_BATCH = 32  # fixed, so that the bytes of a cache do not depend on where its building was cut off


class FeatureCache:
    """The float16 features of `items` (path, texts), in a folder below `root`; built or completed if need be.

    The folder is named by a hash of encoders, precision, preprocessing and of the contents, read at each
    start, of pictures and texts: a copy of the data needs no new cache, and other data never meet an old one.

    `readable` and `unreadable`: indices of items whose picture can be decoded, or not; `digests`: the items'
    hashes; `first` [I + 1]: each item's first text; `offsets` [texts + 1]: each text's first token.
    """

    def __init__(self, root, items, net, workers):
        self.items, self.net = items, net
        with ThreadPoolExecutor(workers) as pool:  # a picture's own hash first: its bytes end somewhere
            self.digests = list(pool.map(lambda item: digest(digest(read_file(item[0])), item[1]), items))
        texts = [text for _, captions in items for text in captions]
        batches = (texts[n:n + 1000] for n in range(0, len(texts), 1000))  # all at once would take GBs
        tokens = [len(ids) for batch in batches for ids in net.text_encoder.tokenize(batch)["input_ids"]]
        self.offsets = np.cumsum([0, *tokens])
        self.first = np.cumsum([0, *(len(captions) for _, captions in items)])
        self.size = net.image_encoder.data_config["input_size"][1:]
        self.transform = image_transform(net.image_encoder.data_config)
        self.encoders = net.fingerprint()
        self.key = digest([self.encoders, str(net.dtype), str(self.transform), self.digests])
        self.folder = Path(root) / self.key
        self.shapes = {"image.f16": (np.prod(net.grid), net.image_encoder.dim),  # a row is a picture
                       "text.f16": (net.text_encoder.dim,)}  # or a token
        with locked(self.folder, wait=True):
            self.build(workers)
        unreadable = np.isnan(self.map("image.f16")[:, 0, 0])
        self.readable, self.unreadable = np.flatnonzero(~unreadable), np.flatnonzero(unreadable)
        most = net.text_encoder.max_tokens
        cut = sum(length >= most for length in tokens)
        note = f"; {cut} have {most} tokens or more: f_T reads {most}" if cut else ""
        print(f"features: {self.folder}, {len(items)} images ({len(self.unreadable)} unreadable), "
              f"{len(texts)} texts{note}")
        self.on_device = {}
        takes = sum(self.map(name).nbytes for name in self.shapes)
        if net.device.type == "cuda" and takes < torch.cuda.mem_get_info(net.device)[0] / 2:  # half: to train
            self.on_device = {name: torch.tensor(self.map(name), device=net.device) for name in self.shapes}

    def build(self, workers):
        """Encode what is not there: both files grow chunk by chunk, each on the disk before the next one."""
        ends = [*range(0, len(self.items), ENCODE_BATCH), len(self.items)]  # of chunks, in items
        rows = np.stack([ends, self.offsets[self.first[ends]]])  # [2, chunks + 1], in rows of the two files
        sizes = rows * [[2 * np.prod(shape)] for shape in self.shapes.values()]  # and in bytes
        finished = self.folder / "finished"
        with (open(self.folder / "image.f16", "ab") as images, open(self.folder / "text.f16", "ab") as tokens,
              ThreadPoolExecutor(workers) as pool):
            there = np.array([[images.tell()], [tokens.tell()]])
            if finished.exists() and (there == sizes[:, -1:]).all():
                return
            finished.unlink(missing_ok=True)
            # Chunks that are whole, but for the last, whose bytes may be lost; what is too long is not ours
            whole = max(0, (sizes <= there).all(0).sum() - 2)
            if (there > sizes[:, -1:]).any():
                whole = 0
            images.truncate(sizes[0, whole])
            tokens.truncate(sizes[1, whole])
            needed = (sizes[:, -1] - sizes[:, whole]).sum()
            free = shutil.disk_usage(self.folder).free
            room = f"the cache takes {needed / 1e9:.3g} GB in {self.folder}, {free / 1e9:.3g} GB are free"
            print(room)
            if needed > free:
                raise UserError(f"{room}: name another folder with --cache DIR")
            chunks = [self.items[start:end] for start, end in pairwise(ends[whole:])]
            decoded = read_ahead(lambda chunk: list(pool.map(self.decode, chunk)), chunks)
            for chunk, pictures in zip(tqdm(chunks, "encode", unit=f" x {ENCODE_BATCH} images"), decoded):
                texts = [text for _, captions in chunk for text in captions]
                for file, features in zip((images, tokens), self.encode(pictures, texts)):
                    file.write(features.numpy().tobytes())
                    file.flush()
                    os.fsync(file.fileno())
            assert [images.tell(), tokens.tell()] == sizes[:, -1].tolist()  # or rows would be misplaced
        finished.touch()

    def decode(self, item):
        """An item's picture -> [3, H, W], or None if it cannot be read."""
        try:
            return self.transform(read_image(item[0], self.size))
        except NOT_AN_IMAGE as error:
            if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise  # too many open files, or the like: the picture is not to blame
            print(f"skipped, cannot be read: {item[0]} ({error})", file=sys.stderr)

    def encode(self, pictures, texts):
        """Pictures, all their texts -> float16 patches [B, N, D_I], NaN for no picture, tokens [T, D_T]."""
        readable = [i for i, picture in enumerate(pictures) if picture is not None]
        s_image = torch.full((len(pictures), *self.shapes["image.f16"]), np.nan, dtype=torch.float16)
        if readable:
            images = torch.stack([pictures[i] for i in readable])
            s_image[readable] = self.net.frozen_image(images).cpu().half()
        parts = [texts[n:n + ENCODE_BATCH] for n in range(0, len(texts), ENCODE_BATCH)]
        s_text = torch.cat([states[mask].cpu().half() for states, mask in map(self.net.frozen_text, parts)])
        if not (s_image[readable].isfinite().all() and s_text.isfinite().all()):
            raise UserError("the features of --image_encoder or --text_encoder do not fit float16")
        return s_image, s_text

    def map(self, name):
        """A file as an array on the disk, opened each time: what is read of an open one fills memory."""
        return np.memmap(self.folder / name, np.float16, "r").reshape(-1, *self.shapes[name])

    def rows(self, name, index):
        """Rows [*index.shape, ...] of a file."""
        if self.on_device:
            return self.on_device[name][torch.from_numpy(index).to(self.net.device)]
        rows = torch.from_numpy(self.map(name)[index])
        return rows.pin_memory() if self.net.device.type == "cuda" else rows

    def read(self, draw):
        """(images [B], numbers of texts [B]) -> s_image [B, N, D_I], s_text [B, L, D_T], mask [B, L]"""
        images, texts = draw
        start, end = self.offsets[texts][:, None], self.offsets[texts + 1][:, None]  # [B, 1]
        position = start + np.arange((end - start).max())  # [B, L]
        mask = position < end
        s_text = self.rows("text.f16", np.where(mask, position, start))  # `batches` zeroes the padding
        return self.rows("image.f16", images), s_text, torch.from_numpy(mask)

    def batches(self, draws):
        """For each draw (see `read`) s_image and s_text, 0 where padded, on the device in its dtype; mask."""
        for features in map(self.read, draws) if self.on_device else read_ahead(self.read, draws):
            s_image, s_text, mask = (tensor.to(self.net.device, non_blocking=True) for tensor in features)
            yield s_image.to(self.net.dtype), s_text.to(self.net.dtype) * mask[:, :, None], mask


# ---- MVSA --------------------------------------------------------------------------------------------------


@dataclass
class Post:
    """One post. Ids clash between the two sets, so a post's key is (set, id)."""
    set: str  # "single" or "multi"
    id: str
    image: Path
    text: str
    label: int  # index into LABELS


def find_mvsa(root):
    """{"single": folder, "multi": folder}, or one of them: `root` or folders up to two levels below, of any
    name: the label file's header tells the set. Raises UserError for none or two of a kind."""
    found = {}
    levels = ("labelResultAll.txt", "*/labelResultAll.txt", "*/*/labelResultAll.txt")
    for labels in sorted(path for level in levels for path in Path(root).glob(level)):
        if not (labels.parent / "data").is_dir():
            raise UserError(f"{labels} has no folder {labels.parent / 'data'} beside it\n  {MVSA_HELP}")
        kind = read_labels(labels)[0]
        if kind in found:
            raise UserError(f"two folders hold MVSA-{kind}: {found[kind]} and {labels.parent}; keep one")
        found[kind] = labels.parent
    if not found:
        raise UserError(f"MVSA not found: looked for {root}/{', '.join(levels)}\n  {MVSA_HELP}")
    return found


def merge_labels(text, image):
    """A post's label (Niu et al. 2016): neutral gives way, positive with negative gives None."""
    if text == image or image == "neutral":
        return text
    return image if text == "neutral" else None


def read_labels(labels):
    """labelResultAll.txt -> ("single" or "multi", {id: label}, {id: reason}) of the posts kept and skipped. A
    pair text,image for each annotator: one in Single, three in Multi. Any other format: UserError."""
    text = (read_file(labels) or b"").decode("utf-8-sig", "surrogateescape")  # other bytes are refused below
    lines = re.split(r"\r\n|\n|\r", text)  # not splitlines(): it splits at a dozen other characters, too
    rows = [(n, line.split("\t")) for n, line in enumerate(lines, start=1) if line.strip()]
    header = ["".join(name.lower().split()) for name in rows[0][1]] if rows else []
    columns = len(header) - 1
    if columns not in (1, 3) or header != ["id"] + ["text,image"] * columns:
        raise UserError(f"{labels} is not the label file: the first line must be ID, 1 or 3 times text,image")
    kept, skipped = {}, {}
    for n, (post, *votes) in rows[1:]:
        post = post.strip()
        words = [word.strip().lower() for vote in votes for word in vote.split(",")]
        paired = [vote.count(",") for vote in votes] == [1] * columns
        if not post or not post.isprintable() or not paired or not set(words) <= set(LABELS):
            raise UserError(f"{labels}, line {n}: not an id and {columns} times text,image of {LABELS}")
        if post in kept or post in skipped:
            raise UserError(f"{labels}, line {n}: id {post} is there a second time")
        # What more than half of the annotators say of the text, and of the image
        sides = words[::2], words[1::2]
        agreed = [word for side in sides for word in LABELS if 2 * side.count(word) > columns]
        label = merge_labels(*agreed) if len(agreed) == 2 else None
        if label:
            kept[post] = LABELS.index(label)
        else:
            skipped[post] = "text and image of opposite polarity" if len(agreed) == 2 else "no majority"
    return {1: "single", 3: "multi"}[columns], kept, skipped


def decode_text(content):
    """A raw post -> text: the files mix UTF-8 and GBK-family bytes."""
    utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))  # the GBK family would read it as other words
    for encoding in ("utf-16",) * utf16 + ("utf-8-sig", "gb18030", "latin-1"):
        with suppress(UnicodeDecodeError):  # then the next one; Latin-1 takes whatever is left
            return content.decode(encoding).strip()


def load_mvsa(folder):
    """One MVSA folder -> (posts in the label file's order, Counter of what was skipped). Decodes no image."""
    labels = Path(folder) / "labelResultAll.txt"
    kind, kept, dropped = read_labels(labels)
    posts, skipped = [], Counter(dropped.values())
    for post, label in kept.items():
        image = Path(folder) / "data" / f"{post}.jpg"
        text = read_file(image.with_suffix(".txt"))
        if text is None or not image.is_file():
            skipped["text or image file missing"] += 1
        else:
            posts.append(Post(kind, post, image, decode_text(text), label))
    if not posts:
        raise UserError(f"{labels} has no post to use; skipped: {describe(skipped)}\n  {MVSA_HELP}")
    return posts, skipped


def stratified_split(labels, seed, groups=None):
    """Labels [P] -> indices of train, validation and test, 8:1:1, each with the whole's shares of classes;
    with `groups` [P] as nearly as whole groups can."""
    labels, everything = np.asarray(labels), np.arange(len(labels))
    try:
        if groups is not None:
            folds = StratifiedGroupKFold(10, shuffle=True, random_state=seed).split(labels, labels, groups)
            test, validation, *train = [test for _, test in folds]
            return np.concatenate(train), validation, test
        train, rest = train_test_split(everything, test_size=0.2, random_state=seed, stratify=labels)
        validation, test = train_test_split(rest, test_size=0.5, random_state=seed, stratify=labels[rest])
        return train, validation, test
    except ValueError as error:  # scikit-learn: a class has too few posts to be in every part
        raise UserError(f"cannot split {len(labels)} posts 8:1:1: {error}") from error


def random_split(labels, seed):
    """As stratified_split, but at random, then training posts repeated to equal classes: the authors' way."""
    labels, tenth = np.asarray(labels), len(labels) // 10
    order = np.random.default_rng(seed).permutation(len(labels))
    validation, test, train = np.split(order, [tenth, 2 * tenth])
    counts = np.bincount(labels[train])
    rng = np.random.default_rng(seed)
    repeated = [rng.choice(train[labels[train] == label], counts.max() - count)
                for label, count in enumerate(counts) if count]
    return np.concatenate([train, *repeated]), validation, test


def normalize_text(text):
    """A text without links, mentions, punctuation and case: what is left when a post is sent again."""
    text = re.sub(r"https?\S+|www\.\S+|\brt\s+@\w+|@\w+", " ", text.lower())
    return " ".join(re.sub(r"[\W_]+", " ", text).split())


def post_keys(post):
    """What makes two posts repeats: the bytes of the image, and the words if there are any."""
    words = normalize_text(post.text)
    return [("image", digest(read_file(post.image)))] + [("words", words)] * bool(words)


def repeats(posts, train, *parts):
    """For each part [(what, index)] of its posts that have the image or the words of a post of `train`."""
    seen = {key for i in train for key in post_keys(posts[i])}
    return [[(key[0], i) for i in part for key in post_keys(posts[i]) if key in seen] for part in parts]


def duplicate_groups(posts):
    """Posts -> [P] the first of all posts that the same image bytes or the same words link to each."""
    first, linked = {}, DisjointSet(range(len(posts)))
    for i, post in enumerate(posts):
        for key in post_keys(post):
            linked.merge(i, first.setdefault(key, i))
    number = {}  # of a group, by the post that DisjointSet names it by
    return np.array([number.setdefault(linked[i], i) for i in range(len(posts))])


def clmlf_split(folder, posts):
    """CLMLF's train.json, dev.json and test.json in `folder` or below, of several those whose path names the
    set of `posts`, "single" or "multi" -> (indices of each, Counter of what did not match), or UserError."""
    folder, kind = Path(folder), posts[0].set
    homes = [path.parent for path in sorted(folder.rglob("train.json"))]
    homes = [home for home in homes if kind in str(home.relative_to(folder)).lower()] or homes
    if len(homes) != 1:
        raise UserError(f"--split {folder}: looked for one train.json of MVSA-{kind} there or below, with "
                        f"'{kind}' in its path; found {len(homes)}: {', '.join(map(str, homes))}")
    index, parts, notes = {post.id: i for i, post in enumerate(posts)}, [], Counter()
    for path in (homes[0] / name for name in ("train.json", "dev.json", "test.json")):
        try:
            entries = json.loads(path.read_bytes())
            listed = [(str(entry["id"]), int(entry["emotion_label"])) for entry in entries]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no list of id, text, emotion_label: {error!r}") from error
        here = [(index[post], label) for post, label in listed if post in index]
        notes["listed, but not among the posts"] += len(listed) - len(here)
        notes["labelled otherwise there"] += sum(posts[i].label != label for i, label in here)
        parts.append(np.array([i for i, _ in here], dtype=int))
    sizes = [len(part) for part in parts]
    used = len(np.unique(np.concatenate(parts)))
    notes["listed twice"] = sum(sizes) - used
    notes["not listed, so not used"] = len(posts) - used
    if notes["labelled otherwise there"] * 20 > used or notes["listed twice"] or min(sizes) == 0:
        raise UserError(f"--split {homes[0]} is not a split of MVSA-{kind}: {dict(notes)}, sizes {sizes}")
    return parts, notes


# ---- The toy world -----------------------------------------------------------------------------------------
#
# A picture is four things on grey, two above two, each of one of 3 colours in one of 3 patterns, all equally
# likely: only the caption, which names the four in reading order, tells a masked one. A colour has 12 words,
# whose meaning is seen only beside pictures, and a mood: a post's picture has that of most of its things, its
# text that of the thing it names first, which is another. The label, by MVSA's rules, needs both.

COLOURS = (  # in the order of LABELS: the moods
    ((60, 200, 60), "green lime olive emerald jade moss fern mint sage pine grass forest".split()),
    ((60, 90, 230), "blue navy azure cobalt sky indigo denim ocean sapphire cerulean ink lapis".split()),
    ((230, 60, 60), "red crimson scarlet ruby cherry brick rose wine coral cardinal maroon vermilion".split())
)
PATTERNS = (("bars", "pillars", "columns"), ("stripes", "bands", "lines"), ("checks", "squares", "tiles"))


def toy_image(things, rng):
    """Things [4, (colour, pattern)] -> 48 x 48 RGB image with pixel noise; each covers 2 x 2 patches of 8."""
    pixels = np.full((48, 48, 3), 128.0)
    y, x = np.mgrid[:16, :16] // 2  # stripes are two pixels wide
    for place, (colour, pattern) in enumerate(things):
        light = (x % 2, y % 2, (x + y) % 2)[pattern]
        top, left = 8 + 16 * (place // 2), 8 + 16 * (place % 2)
        pixels[top:top + 16, left:left + 16] = np.array(COLOURS[colour][0]) * (0.5 + 0.5 * light[:, :, None])
    return Image.fromarray((pixels + rng.normal(0, 12, pixels.shape)).clip(0, 255).astype(np.uint8))


def toy_text(things, rng):
    """Things [4, (colour, pattern)] -> "scarlet bars navy tiles ...", each word drawn from its synonyms."""
    pairs = [(COLOURS[colour][1], PATTERNS[pattern]) for colour, pattern in things]
    return " ".join(rng.choice(words) for pair in pairs for words in pair)


def write_toy_coco(root, count, rng):
    """COCO's layout, with one broken image and one that is listed but not there."""
    images, notes = [], []
    for i in range(count + 2):
        path = root / "train2017" / f"{i:012d}.jpg"
        things = rng.integers(3, size=(4, 2))
        images.append({"id": i, "file_name": path.name, "width": 48, "height": 48})
        notes += [{"id": 5 * i + k, "image_id": i, "caption": toy_text(things, rng)} for k in range(5)]
        if i < count:
            toy_image(things, rng).save(path, quality=92)
        elif i == count:
            path.write_bytes(b"\xff\xd8 not a JPEG")
    (root / CAPTIONS).write_text(json.dumps({"images": images, "annotations": notes}))


def write_toy_mvsa(root, count, voters, rng):
    """MVSA's layout: `count` posts to keep; conflicts, missing majorities (Multi), a broken image, GBK."""
    folder = root / "data"
    rows, kept = [["ID"] + ["text,image"] * voters], 0
    while kept < count:
        number = len(rows)
        text, image = rng.integers(3, size=2)
        votes = [[text, image] for _ in range(voters)]
        if voters == 3:
            votes[rng.integers(3)][rng.integers(2)] = rng.integers(3)  # one may disagree
        undecided = voters == 3 and number % 25 == 0
        if undecided:
            votes = [[vote, image] for vote in range(3)]
        kept += bool(merge_labels(LABELS[text], LABELS[image]) and not undecided)
        rows.append([str(number)] + [f"{LABELS[t]},{LABELS[i]}" for t, i in votes])
        shown = rng.integers(3, size=(4, 2))
        shown[rng.random(4) < 0.8, 0] = image  # the mood of most things in the picture
        named = rng.integers(3, size=(4, 2))
        named[0, 0] = text  # and of the one that the text names first
        toy_image(shown, rng).save(folder / f"{number}.jpg", quality=92)
        words = toy_text(named, rng) + " #caf\u00e9" * (number == 3)
        (folder / f"{number}.txt").write_bytes(words.encode("gb18030"))
    rows.append([str(number + 1)] + ["positive,positive"] * voters)
    (folder / f"{number + 1}.txt").write_text("red bars")
    (folder / f"{number + 1}.jpg").touch()
    (root / "labelResultAll.txt").write_bytes("".join("\t".join(row) + "\r\n" for row in rows).encode())


def write_toy(root, images=1100, posts=1000, seed=0):
    """Write coco/ and mvsa/, always the same bytes, or complete them. UserError if other files are there."""
    recipe = json.dumps({"images": images, "posts": posts, "seed": seed}, indent=1).encode()
    there = {path.name for path in root.glob("*")} - {".lock", "recipe.json.tmp"}  # if cut off at once
    if there and read_file(root / "recipe.json") != recipe:
        raise UserError(f"{root} exists, but not as toy data of these options: remove it or name another")
    with locked(root, wait=True):
        if not (root / "finished").exists() or read_file(root / "recipe.json") != recipe:
            atomic_write(root / "recipe.json", recipe)  # from here on the folder is ours
            coco, single, multi = root / "coco", root / "mvsa/MVSA_Single", root / "mvsa/MVSA_Multiple"
            for folder in (coco / "train2017", coco / "annotations", single / "data", multi / "data"):
                folder.mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng(seed)
            write_toy_coco(coco, images, rng)
            write_toy_mvsa(single, posts, 1, rng)
            write_toy_mvsa(multi, 2 * posts, 3, rng)
            (root / "finished").touch()


# ---- The commands. Downloads go on where they were cut off -------------------------------------------------

COCO_URL = "http://images.cocodataset.org"  # its https has another name's certificate
PAUSES = (0, 1, 4, 16)  # seconds before each try


def fetch(url, path, memory=0):
    """Fetch a file, by way of `path`.part; to read it takes `memory` times its size. UserError for too little
    disk or memory, or after several tries in a row that bring nothing new."""
    part, tries = path.with_name(path.name + ".part"), 0
    while not path.is_file():
        there = part.stat().st_size if part.exists() else 0
        try:
            fetch_rest(url, part, there, memory)
            os.replace(part, path)
        except (OSError, HTTPException) as error:
            tries = 0 if part.exists() and part.stat().st_size > there else tries + 1
            if tries == len(PAUSES):
                raise UserError(f"{url} ({error}): run again to go on, or remove {part}") from error
            time.sleep(PAUSES[tries])
    return path


def fetch_rest(url, part, there, memory):
    """Append to `part`, of which `there` bytes are there, the rest. OSError or HTTPException if it breaks."""
    start = max(0, there - 1)  # the last byte again: a server refuses to send an empty rest
    headers = {"Range": f"bytes={start}-", "User-Agent": "torch.hub"}  # some refuse urllib's own name
    with urlopen(Request(url, headers=headers), timeout=30) as answer, open(part, "ab") as file:
        if answer.headers.get_content_type() == "text/html":
            raise OSError("a web page, as of a network that asks for a login")
        start *= answer.status == 206  # else it sends the whole file
        size = start + int(answer.headers["Content-Length"] or 0)
        free = shutil.disk_usage(part.parent).free
        installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # free is without the file cache
        for what, takes, has in ("disk", size - there, free), ("memory", memory * size, installed):
            if takes > has:
                raise UserError(f"{url} takes {takes / 1e9:.3g} GB of {what}; here: {has / 1e9:.3g}")
        file.truncate(start)
        with tqdm.wrapattr(file, "write", size, desc=part.name, initial=start, disable=size < 1e7) as shown:
            shutil.copyfileobj(answer, shown)
        file.flush()
        os.fsync(file.fileno())
    if part.stat().st_size != size:
        raise OSError("the connection breaks off")


def fill(root, names, archive=""):
    """Fetch what `root` lacks of COCO's files `names`, 16 at a time: each alone, or all in the zip `archive`.
    UserError names the first that fail; the others are kept."""
    def get(name):
        (root / name).parent.mkdir(exist_ok=True)
        try:
            if archive:
                atomic_write(root / name, opened.read(name))
            else:
                fetch(f"{COCO_URL}/{quote(name)}", root / name)
        except (UserError, KeyError, BadZipFile, zlib.error) as error:  # KeyError: the zip lacks it
            return f"{name} ({error})"

    missing = [name for name in names if not (root / name).is_file()]
    if archive and missing:
        path = fetch(f"{COCO_URL}/{archive}", root / Path(archive).name)
        try:
            opened = ZipFile(path)
        except BadZipFile as error:
            raise UserError(f"{path} is broken: remove it and run again") from error
    with ThreadPool(16) as pool:  # of daemons: Ctrl-C waits for none of them
        problems, in_a_row = [], 0
        for problem in tqdm(pool.imap(get, missing), "fetch", len(missing), disable=not missing):
            problems += [problem] * bool(problem)
            in_a_row = in_a_row + 1 if problem else 0
            if in_a_row == 25:  # 100 tries: it is the network
                break
    if problems:
        lacking = sum(not (root / name).is_file() for name in names)
        raise UserError(f"{lacking} of {len(names)} cannot be fetched: {', '.join(problems[:3])}; run again, "
                        "without a zip that is broken")


def fetch_coco(root, images):
    """Fetch the captions and images that load_coco(root, images) takes: one by one, or for 0 in one zip."""
    with locked(root):
        fill(root, [CAPTIONS], "annotations/annotations_trainval2017.zip")
        files, captioned = parse_captions((root / CAPTIONS).read_bytes(), root / CAPTIONS)
        names = [f"train2017/{Path(name).name}" for i, name in sorted(files.items()) if i in captioned]
        fill(root, names[:images or None], "" if images else "zips/train2017.zip")


def fetch_weights(root, preset):
    """Fetch f_I's file into `root`, or by huggingface if timm has it from there. Raises UserError."""
    name = PRESETS[preset].image_encoder
    config = timm.get_pretrained_cfg(name)
    if config.hf_hub_id:
        ImageEncoder(name)
        print(f"{name}: {config.hf_hub_id} is in huggingface's own cache, where runs find it by name")
        return
    print("I-JEPA's file is a whole training checkpoint, by count about 10 GB, and is read into memory whole")
    with locked(root):
        print(fetch(config.url, root / config.url.split("/")[-1], memory=1.25))  # a quarter more: f_I itself


def check(coco, mvsa):
    """Raises UserError for what is missing of both data sets."""
    missing = []
    for find, root in ((load_coco, coco), (find_mvsa, mvsa)):
        try:
            find(root)
        except UserError as error:
            missing.append(str(error))
    if missing:
        raise UserError("\n".join(missing))


def run(argv=None):
    """The commands of the top of this file -> exit code, see run_command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    toy = commands.add_parser("toy", help="write the toy data")
    toy.add_argument("root", metavar="dir", type=Path, help="folder to make; gets coco/ and mvsa/")
    toy.add_argument("--images", **number(int, 1), default=1100, help="pictures with captions (1100)")
    toy.add_argument("--posts", **number(int, 1), default=1000, help="of Single (1000); Multi has twice that")
    toy.add_argument("--seed", **number(int, 0), default=0, help="the same seed (0) gives the same bytes")
    both = commands.add_parser("check", help="look for the data")
    both.add_argument("--coco", required=True, help="folder with train2017/ and annotations/")
    both.add_argument("--mvsa", required=True, help="folder with one or both MVSA sets")
    coco = commands.add_parser("coco", help="fetch COCO 2017's captions and images")
    coco.add_argument("root", metavar="dir", type=Path, help="folder to make; gets train2017/, annotations/")
    coco.add_argument("--images", **number(int, 0), default=10000, help="how many (10000; 0: all, 19 GB)")
    weights = commands.add_parser("weights", help="fetch f_I's weights")
    weights.add_argument("root", metavar="dir", type=Path, help="folder to make; gets the file")
    weights.add_argument("--preset", required=True, choices=list(PRESETS)[1:])  # not the toy
    functions = {"toy": write_toy, "check": check, "coco": fetch_coco, "weights": fetch_weights}
    options = vars(parser.parse_args(argv))  # but for the command, the function's arguments
    function = functions[options.pop("command")]
    return run_command(lambda: function(**options), "--images or --posts")


if __name__ == "__main__":
    sys.exit(run())
