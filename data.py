"""The data: COCO captions, MVSA posts, splits, the feature cache, the toy world, downloads.

    python data.py toy DIR                      write toy data in the official layouts: DIR/coco, DIR/mvsa
    python data.py check --coco DIR --mvsa DIR  look for both, and say what is missing
    python data.py coco DIR --images 10000      fetch COCO's captions and first 10,000 images (0: all)
"""
import argparse
import csv
import errno
import fcntl
import hashlib
import json
import math
import mmap
import os
import re
import stat
import struct
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from io import BytesIO, StringIO
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote
from urllib.request import urlopen
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy.cluster.hierarchy import DisjointSet
from sklearn.model_selection import StratifiedGroupKFold, train_test_split
from tqdm import tqdm

from model import OUT_OF_MEMORY, Features, UserError

LABELS = ("positive", "neutral", "negative")  # of MVSA, in CLMLF's order: emotion_label 0, 1, 2
PARTS = ("train", "validation", "test")
CAPTIONS = "annotations/captions_train2017.json"
COCO_HELP = "name its folder with --coco, or fetch it by `make coco COCO=DIR`"
MVSA_HELP = "download it by hand: mcrlab.net, or Kaggle's vincemarcs/mvsasingle and vincemarcs/mvsamultiple"

# What Pillow's decoders raise on bytes that are no image, or not a complete one
NOT_AN_IMAGE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, LookupError, TypeError,
                struct.error, Image.DecompressionBombError)


# ---- COCO: pictures, captions, the order of an epoch, the held-out images ----
def read_image(path, encoder, expected=""):
    """Path -> pixels uint8 [3, H, W], upright, squashed (as the authors do) to f_I's input size. A crop
    would lose the edges, and captions are about them, too. Raises UserError for what Pillow cannot decode,
    OSError if the bytes have another digest than `expected`."""
    (height, width), method = encoder.input_size, Image.Resampling[encoder.interpolation.upper()]
    content = read_file(Path(path))
    if expected and digest(content) != expected:
        raise OSError(errno.ESTALE, "it changed while it was read", str(path))
    if content is None:
        raise UserError(f"{path} is no file")
    try:
        with named(path), Image.open(BytesIO(content)) as image:
            image.draft(None, (2 * width, 2 * height))  # a large JPEG is decoded at 1/2, 1/4 or 1/8
            image = ImageOps.exif_transpose(image).convert("RGB").resize((width, height), method)
    except NOT_AN_IMAGE as error:
        if getattr(error, "errno", None) or re.search(OUT_OF_MEMORY, str(error)):  # not the picture's fault
            raise
        raise UserError(f"{path} cannot be read as an image: {error!r:.100}") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def parse_captions(content, name):
    """The bytes of caption file `name` -> {image id: file name}, {image id: captions}. Raises UserError."""
    try:
        parsed = json.loads(content)
        images = [(image["id"], image["file_name"]) for image in parsed["images"]]
        notes = [(note["image_id"], note["caption"].strip()) for note in parsed["annotations"]]
        if not all(type(i) is int and type(text) is str for i, text in images + notes):  # 1 == 1.0 == True
            raise TypeError("an id is not an int, or a file name or caption not a string")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{name} is not a COCO caption file: {error!r}; {COCO_HELP}") from error
    files, captions = dict(images), {}
    if not len(images) == len(files) == len(set(files.values())):
        raise UserError(f"{name} lists an image id or a file name twice")
    for image, caption in notes:
        captions.setdefault(image, []).append(caption)
    return files, captions


def load_coco(root, limit=0):
    """COCO 2017 below `root` -> items [(path, captions)] in order of image id, Counter of what was skipped.
    Returns the first `limit` items (0: all). Raises UserError if there is none."""
    folder, annotations = Path(root) / "train2017", Path(root) / CAPTIONS
    content = read_file(annotations)
    if content is None or not folder.is_dir():
        raise UserError(f"COCO 2017 not found: looked for {folder} and {annotations}\n  {COCO_HELP}")
    files, captions = parse_captions(content, annotations)
    on_disk = {path.name for path in folder.iterdir()}
    paths = {image: folder / name for image, name in sorted(files.items()) if name in on_disk}
    items = [(path, captions[image]) for image, path in paths.items() if image in captions]
    skipped = Counter({"captioned image not listed": len(captions.keys() - files.keys()),
                       "image not on disk": len(files) - len(paths),
                       "image without caption": len(paths) - len(items)})
    if not items:
        raise UserError(f"no image of {folder} has a caption in {annotations}; skipped: {describe(skipped)}")
    return items[:limit or None], +skipped  # without zeros


def epoch_order(cache, train, seed, epoch):
    """One epoch -> (the images `train` in a new order, the index of a random caption of each)."""
    rng = np.random.default_rng([seed, epoch])
    images = rng.permutation(train)
    return images, rng.integers(cache.first[images], cache.first[images + 1])


def default_held_out(images):
    """How many of these images to hold out: a tenth, from 2 to 100."""
    return min(100, max(2, images // 10))


def hold_out(cache, count):
    """Indices of the readable images to train on, and of the `count` to measure on (0: the default):
    the first by hash of the file name, so a lost image moves no other. Files of equal bytes go with the last
    of them; this can hold out more than `count`. Raises UserError unless it is at least 2, and not all."""
    count = count or default_held_out(len(cache.readable))
    pictures, names = cache.pictures, [digest(path.name) for path, _ in cache.items]
    last = dict(sorted((pictures[i], names[i]) for i in cache.readable))  # of equal pictures the last name
    order = sorted(cache.readable, key=lambda i: (last[pictures[i]], names[i]))
    while 0 < count < len(order) and pictures[order[count - 1]] == pictures[order[count]]:
        count += 1
    if not 1 < count < len(order):
        raise UserError(f"--held_out {count} of {len(order)} readable images: at least 2, not all")
    return np.sort(order[count:]), np.sort(order[:count])


# ---- The feature cache: f_I and f_T are frozen and pictures are not augmented, so each is encoded once ----

ENCODE_BATCH = 32  # images, or texts, in one pass of f_I or f_T


class FeatureCache:
    """The float16 features of `items` (path, texts), in a folder below `root`. Encodes them if not there.
    The folder's name is a hash of encoders, precision, pictures and texts, all read at each start. So a copy
    of the data needs no new cache, and other data never use an old one. With `pixels` the folder also has
    the decoded pictures.

    `readable`, `unreadable`: indices of items whose picture can, or cannot, be decoded.
    `pictures`: hashes of the pictures' bytes. `digests`: hashes of picture and texts.
    `first` [I + 1]: each item's first text. `offsets` [texts + 1]: each text's first token.
    """

    def __init__(self, root, items, net, pixels=False):
        self.items, self.net = items, net
        with ThreadPoolExecutor() as pool:
            self.pictures = list(pool.map(lambda item: digest(read_file(item[0])), items))
        self.digests = [digest(picture, captions) for picture, (_, captions) in zip(self.pictures, items)]
        texts = [text for _, captions in items for text in captions]
        tokens, unknown = [], 0  # of each text; of all
        for n in range(0, len(texts), 1000):  # all at once would take GBs
            ids = net.text_encoder.tokenize(texts[n:n + 1000])["input_ids"]
            tokens += map(len, ids)
            unknown += sum(one.count(net.text_encoder.tokenizer.unk_token_id) for one in ids)
        self.offsets = np.cumsum([0, *tokens])
        self.first = np.cumsum([0, *(len(captions) for _, captions in items)])
        self.encoders = net.fingerprint()  # with f_I's size, interpolation, mean and std
        self.key = digest([self.encoders, str(net.dtype), self.digests])
        self.folder = Path(root) / self.key
        self.shapes = {"image.float16": (len(items), math.prod(net.grid), net.image_encoder.dim),
                       "text.float16": (sum(tokens), net.text_encoder.dim)}  # all texts, one after another
        if pixels:
            self.shapes["image.uint8"] = len(items), 3, *net.image_encoder.input_size
        sizes = {self.folder / name: np.dtype(name.split(".")[1]).itemsize * math.prod(shape)  # in bytes
                 for name, shape in self.shapes.items()}
        with locked(self.folder, wait=True):
            if any(not is_file(path) or path.stat().st_size != size for path, size in sizes.items()):
                self.build(sizes)
        readable = ~np.isnan(self.map("image.float16")[:, 0, 0])
        self.readable, self.unreadable = np.flatnonzero(readable), np.flatnonzero(~readable)
        longest = net.text_encoder.max_tokens
        cut = sum(length >= longest for length in tokens)
        note = f"; {cut} have {longest} tokens or more: f_T reads {longest}" if cut else ""
        if 20 * unknown > sum(tokens):
            note += f"; f_T does not know {unknown / sum(tokens):.0%} of their tokens"
        known, rows = len(net.text_encoder.tokenizer), net.text_encoder.bert.config.vocab_size
        if known < 0.9 * rows:
            note += f"; f_T's tokenizer has {known} of the {rows} tokens of its embedding: is it cut off?"
        print(f"features: {self.folder}, {len(items)} images ({len(self.unreadable)} unreadable), "
              f"{len(texts)} texts{note}")

    def build(self, sizes):
        """Encode all items into the files of `sizes` {path: bytes}. A file gets its name when complete."""
        every = range(len(self.items))
        chunks = [every[n:n + ENCODE_BATCH] for n in every[::ENCODE_BATCH]]
        with ExitStack() as stack:
            files = [stack.enter_context(replacing(path)) for path in sizes]
            pool = stack.enter_context(ThreadPoolExecutor())
            decoded = read_ahead(lambda chunk: list(pool.map(self.decode, chunk)), chunks)
            for chunk, pictures in zip(tqdm(chunks, "encode", unit=f" x {ENCODE_BATCH} images"), decoded):
                texts = [text for i in chunk for text in self.items[i][1]]
                for file, rows in zip(files, self.encode(pictures, texts)):
                    file.write(rows.numpy().tobytes())

    def decode(self, i):
        """The picture of item i -> uint8 [3, H, W], or None if it is no image."""
        try:
            return read_image(self.items[i][0], self.net.image_encoder, self.pictures[i])
        except UserError as error:
            print(f"skipped: {error}", file=sys.stderr)

    def encode(self, pictures, texts):
        """Pictures or None [B], all their texts -> rows of each file: s_image float16 [B, N, D_I], NaN for
        None; s_text float16 [tokens, D_T]; the pictures uint8"""
        black = torch.zeros(3, *self.net.image_encoder.input_size, dtype=torch.uint8)
        images = torch.stack([black if picture is None else picture for picture in pictures])
        s_image = self.net.encode_images(images).cpu().half()
        parts = [texts[n:n + ENCODE_BATCH] for n in range(0, len(texts), ENCODE_BATCH)]
        s_text = torch.cat([states[mask].cpu().half() for states, mask in map(self.net.encode_texts, parts)])
        if not (s_image.isfinite().all() and s_text.isfinite().all()):
            raise UserError("the features of --image_encoder or --text_encoder do not fit float16")
        s_image[[i for i, picture in enumerate(pictures) if picture is None]] = np.nan
        return s_image, s_text, images

    def map(self, name):
        """A file as an array on the disk, opened for each read: an open one keeps in memory what was read."""
        with named(self.folder), open(self.folder / name, "rb") as file:  # private works on more disks
            content = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
        return np.frombuffer(content, np.dtype(name.split(".")[1])).reshape(self.shapes[name])

    def rows(self, name, index):
        """Rows [*index.shape, ...] of a file."""
        rows = torch.from_numpy(self.map(name)[index])
        return rows.pin_memory() if self.net.device.type == "cuda" else rows

    def read(self, draw):
        """Indices (images [B], texts [B]) -> Features, on the CPU"""
        images, texts = draw
        start, end = self.offsets[texts][:, None], self.offsets[texts + 1][:, None]  # [B, 1]
        position = start + np.arange((end - start).max())  # [B, L]
        mask = position < end
        s_text = self.rows("text.float16", np.where(mask, position, start))  # `batches` zeroes the padding
        pixels = self.rows("image.uint8", images) if "image.uint8" in self.shapes else None
        return Features(self.rows("image.float16", images), s_text, torch.from_numpy(mask), pixels)

    def batches(self, draws):
        """For each draw (see `read`) its Features, on the device, in its dtype; padding of s_text is 0."""
        device, dtype = self.net.device, self.net.dtype
        for features in read_ahead(self.read, draws):
            s_image, s_text, mask, pixels = (None if tensor is None else tensor.to(device, non_blocking=True)
                                             for tensor in features)
            yield Features(s_image.to(dtype), s_text.to(dtype) * mask[:, :, None], mask, pixels)

    def means(self):
        """The mean token of each picture [I, D_I], NaN for none, and of each text [texts, D_T], float32."""
        images = np.stack([tokens.mean(0, dtype=np.float32) for tokens in self.map("image.float16")])
        texts = np.add.reduceat(self.map("text.float16"), self.offsets[:-1], dtype=np.float32)
        texts /= np.diff(self.offsets)[:, None]
        return torch.from_numpy(images), torch.from_numpy(texts)


def read_ahead(load, keys):
    """Yields load(key) for each key. A thread loads the next one while the caller computes."""
    with ThreadPoolExecutor(1) as reader:
        loads = (reader.submit(load, key) for key in keys)
        ahead = next(loads, None)
        while ahead:
            ready, ahead = ahead, next(loads, None)
            yield ready.result()


# ---- MVSA: posts, labels, splits, repeated posts ----
@dataclass
class Post:
    """One post. Ids clash between the two sets, so a post's key is (set, id)."""
    set: str  # "single", "multi", or "posts": of a posts.csv
    id: str
    image: Path
    text: str
    label: str
    part: str = ""  # one of PARTS, or empty if the set has no split


def merge_labels(text, image):
    """A post's label (Niu et al. 2016): a polarity beats neutral; positive with negative gives None."""
    if text == image or image == "neutral":
        return text
    return image if text == "neutral" else None


def read_labels(path):
    """labelResultAll.txt -> "single" or "multi", {id: label} of the posts to use, {id: reason} of the others.
    Each annotator (one in Single, three in Multi) gives a pair text,image. Raises UserError."""
    text = (read_file(path) or b"").decode("utf-8-sig", "replace")  # other bytes match no pattern
    lines = re.split(r"\r\n|\n|\r", text)  # not splitlines(): it splits at a dozen other characters, too
    (_, header), *rows = [(n, line) for n, line in enumerate(lines, start=1) if line.strip()] or [(1, "")]
    annotators = header.count("\t")
    if annotators not in (1, 3) or "".join(header.lower().split()) != "id" + "text,image" * annotators:
        raise UserError(f"{path} is not the label file: the first line must be ID, 1 or 3 times text,image")
    word, post_id = rf"\s*({'|'.join(LABELS)})\s*", r"\s*([!-~][ -~]*?)\s*"  # an id is printable ASCII
    pattern = re.compile(post_id + rf"\t{word},{word}" * annotators, re.IGNORECASE | re.ASCII)
    labels, skipped = {}, {}
    for n, line in rows:
        match = pattern.fullmatch(line)
        if not match or match[1] in labels or match[1] in skipped:
            raise UserError(f"{path}, line {n}: not a new id and {annotators} times text,image of {LABELS}")
        post, *votes = match.groups()
        sides = [[vote.lower() for vote in votes[side::2]] for side in (0, 1)]  # of the text, of the image
        majority = [label for side in sides for label in LABELS if 2 * side.count(label) > annotators]
        label = merge_labels(*majority) if len(majority) == 2 else None
        if label:
            labels[post] = label
        else:
            skipped[post] = "text and image of opposite polarity" if len(majority) == 2 else "no majority"
    return {1: "single", 3: "multi"}[annotators], labels, skipped


def find_mvsa(root):
    """Folder -> {"single": folder, "multi": folder}, or one of them: in `root` or up to two levels below. The
    label file's header tells the set. Raises UserError for no set, or two folders of one set."""
    folders = {}
    for path in find("labelResultAll.txt", root, levels=2):
        kind = read_labels(path)[0]
        if kind in folders:
            raise UserError(f"two folders hold MVSA-{kind}: {folders[kind]} and {path.parent}; keep one")
        folders[kind] = path.parent
    if not folders:
        raise UserError(f"MVSA not found: no {root}/labelResultAll.txt, nor two levels below\n  {MVSA_HELP}")
    return folders


def find(name, root, levels):
    """The files of this name in `root` and up to `levels` below. Prints which folders it cannot list."""
    def note(error):
        if not isinstance(error, FileNotFoundError):
            print(error, file=sys.stderr)

    for folder, below, names in os.walk(Path(root), onerror=note, followlinks=True):
        if len(Path(folder).relative_to(root).parts) == levels:
            below.clear()
        if name in names:
            yield Path(folder) / name


def load_mvsa(folder):
    """One MVSA folder -> posts in the label file's order, Counter of what was skipped."""
    path = Path(folder) / "labelResultAll.txt"
    kind, labels, dropped = read_labels(path)
    posts, skipped = [], Counter(dropped.values())
    for post, label in labels.items():
        image = Path(folder) / "data" / f"{post}.jpg"
        text = read_file(image.with_suffix(".txt"))
        if text is None or not is_file(image):
            skipped["text or image file missing"] += 1
        else:
            posts.append(Post(kind, post, image, decode_text(text), label))
    if not posts:
        raise UserError(f"{path} has no post to use; skipped: {describe(skipped)}\n  {MVSA_HELP}")
    return posts, skipped


def load_posts(folder):
    """FOLDER/posts.csv -> posts, Counter of what was skipped (and printed). Raises UserError if all are."""
    path = Path(folder) / "posts.csv"
    reader = csv.DictReader(StringIO(decode_text(read_file(path) or b""), newline=""), strict=True)
    try:
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise UserError(f"{path}, after line {reader.line_num}: {error} (double inner quotes)") from error
    if not {"image", "text", "label"} <= set(reader.fieldnames):
        raise UserError(f"{path} is no file that begins with image,text,label or image,text,label,split")
    posts, skipped = [], Counter()
    for n, row in rows:  # a field that the line lacks is None
        name, text, label, part = ((row.get(key) or "").strip() for key in "image text label split".split())
        reason = ("not as many fields as in the first line" if None in row or None in row.values() else
                  "no label" if not label else "no image file" if not is_file(path.parent / name) else
                  f"split is not one of {PARTS}" if "split" in row and part not in PARTS else None)
        if reason:
            skipped[reason] += 1
            print(f"skipped: {path}, line {n}: {reason}", file=sys.stderr)
        else:
            posts.append(Post("posts", str(n), path.parent / name, text, label, part))
    if not posts:
        raise UserError(f"{path} has no post to use; skipped: {describe(skipped)}")
    return posts, skipped


def decode_text(content):
    """A post's bytes -> text. The files mix UTF-8 and the GBK family."""
    utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))  # as GBK it would be other words
    for encoding in ("utf-16",) * utf16 + ("utf-8-sig", "gb18030", "latin-1"):  # Latin-1 takes any bytes
        with suppress(UnicodeDecodeError):
            return content.decode(encoding).strip()


def stratified_split(labels, seed, groups=None):
    """Labels [P] -> indices of train, validation and test, 8:1:1, with equal shares of classes. With
    `groups` [P] no group is divided; shares are approximate. Raises UserError if a class is too small."""
    labels, posts = np.asarray(labels), np.arange(len(labels))
    try:
        if groups is not None:
            folds = StratifiedGroupKFold(10, shuffle=True, random_state=seed).split(labels, labels, groups)
            test, validation, *train = [test for _, test in folds]
            return np.concatenate(train), validation, test
        train, others = train_test_split(posts, test_size=0.2, random_state=seed, stratify=labels)
        validation, test = train_test_split(others, test_size=0.5, random_state=seed, stratify=labels[others])
        return train, validation, test
    except ValueError as error:  # scikit-learn: a class has too few posts to be in every part
        raise UserError(f"cannot split {len(labels)} posts 8:1:1: {error}") from error


def random_split(labels, seed):
    """The authors' split: 8:1:1, not stratified. Repeats training posts until all classes are equal."""
    labels, tenth = np.asarray(labels), len(labels) // 10
    order = np.random.default_rng(seed).permutation(len(labels))
    validation, test, train = np.split(order, [tenth, 2 * tenth])
    counts = np.bincount(labels[train])
    rng = np.random.default_rng(seed)
    repeated = [rng.choice(train[labels[train] == label], counts.max() - count)
                for label, count in enumerate(counts) if count]
    return np.concatenate([train, *repeated]), validation, test


def clmlf_split(folder, posts):
    """CLMLF's train.json, dev.json, test.json -> indices of each, Counter of what does not match. Looks in
    `folder` and below; of several, takes the path that names the set of `posts`. Raises UserError."""
    folder, kind = Path(folder), posts[0].set
    found = (path.parent for path in find("train.json", folder, levels=5))
    homes = [*{home.resolve(): home for home in found}.values()]  # a folder may be linked, even to itself
    homes = [home for home in homes if kind in str(home.relative_to(folder)).lower()] or homes
    if len(homes) != 1:
        raise UserError(f"--split {folder}: looked for one train.json of MVSA-{kind}, found {len(homes)}")
    index, parts, notes = {post.id: i for i, post in enumerate(posts)}, [], Counter()
    label_of = dict(enumerate(LABELS))
    for name in ("train.json", "dev.json", "test.json"):
        try:
            entries = json.loads(read_file(homes[0] / name))  # TypeError: there is none
            listed = [(str(entry["id"]), label_of.get(int(entry["emotion_label"]))) for entry in entries]
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{homes[0] / name} is no list of id, emotion_label: {error!r}") from error
        known = [(index[post], label) for post, label in listed if post in index]
        notes["listed, but not among the posts"] += len(listed) - len(known)
        notes["labelled otherwise there"] += sum(posts[i].label != label for i, label in known)
        parts.append(np.array([i for i, _ in known], dtype=int))
    used = len(np.unique(np.concatenate(parts)))
    notes["listed twice"] = sum(map(len, parts)) - used
    notes["not listed, so not used"] = len(posts) - used
    if not all(map(len, parts)) or notes["labelled otherwise there"] * 20 > used or notes["listed twice"]:
        raise UserError(f"--split {homes[0]} is not a split of MVSA-{kind}: {describe(notes)}")
    return parts, notes


def post_keys(post):
    """A post's keys: the image's bytes; the words, if any. Posts that share a key are repeats. The words omit
    what changes when a post is sent again: links, mentions, punctuation and case."""
    text = re.sub(r"https?\S+|www\.\S+|\brt\s+@\w+|@\w+", " ", post.text.lower())
    words = " ".join(re.sub(r"[\W_]+", " ", text).split())
    return [("image", digest(read_file(post.image)))] + [("words", words)] * bool(words)


def repeats(posts, train, *parts):
    """Each part -> [("image" or "words", index)] of its posts: the key they share with a post of `train`."""
    seen = {key for i in train for key in post_keys(posts[i])}
    return [[(key[0], i) for i in part for key in post_keys(posts[i]) if key in seen] for part in parts]


def duplicate_groups(posts):
    """Posts -> each post's group [P], named by its first post. Equal images or words link, in chains, too."""
    first, linked = {}, DisjointSet(range(len(posts)))
    for i, post in enumerate(posts):
        for key in post_keys(post):
            linked.merge(i, first.setdefault(key, i))
    return np.array([min(linked.subset(i)) for i in range(len(posts))])


# ---- The toy world ----

# A picture is four things on grey, two above two. Each has one of 3 colours and of 3 patterns, all equally
# likely. The caption names the four in reading order; only it tells a masked one. A colour has 12 words and a
# mood. A post's picture has the mood of most of its things; its text has the mood of the thing named first.
# The two moods are independent. The label, by MVSA's rules, needs both.

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
    """MVSA's layout: `count` usable posts, conflicts, no majorities (Multi), a broken image, GBK."""
    folder = root / "data"
    rows, usable = [["ID"] + ["text,image"] * voters], 0
    while usable < count:
        number = len(rows)
        text, image = rng.integers(3, size=2)
        votes = [[text, image] for _ in range(voters)]
        if voters == 3:
            votes[rng.integers(3)][rng.integers(2)] = rng.integers(3)  # one may disagree
        undecided = voters == 3 and number % 25 == 0
        if undecided:
            votes = [[vote, image] for vote in range(3)]
        usable += bool(merge_labels(LABELS[text], LABELS[image]) and not undecided)
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


def write_toy(root, images=1100, posts=1000):
    """Write coco/ and mvsa/, always the same bytes, unless they are there. UserError if others are there."""
    recipe = json.dumps({"images": images, "posts": posts}).encode()
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as beside:
            toy = Path(beside) / root.name
            coco, single, multi = toy / "coco", toy / "mvsa/MVSA_Single", toy / "mvsa/MVSA_Multiple"
            for folder in (coco / "train2017", coco / "annotations", single / "data", multi / "data"):
                folder.mkdir(parents=True)
            rng = np.random.default_rng(0)
            write_toy_coco(coco, images, rng)
            write_toy_mvsa(single, posts, 1, rng)
            write_toy_mvsa(multi, 2 * posts, 3, rng)
            (toy / "recipe.json").write_bytes(recipe)
            with suppress(OSError):  # another process was faster
                os.rename(toy, root)
    if read_file(root / "recipe.json") != recipe:
        raise UserError(f"{root} exists, but not as toy data of these options: remove it or name another")


# ---- Plumbing: downloads, errors, files, locks, the command line ----

COCO_URL = "http://images.cocodataset.org"  # its https has another name's certificate
PAUSES = (0, 1, 4, 16)  # seconds before each try


def fetch(url):
    """The bytes at `url`. Raises UserError after several tries."""
    for pause in PAUSES:
        time.sleep(pause)
        try:
            with urlopen(url, timeout=30) as answer:
                return answer.read()  # raises HTTPException if the connection ends too early
        except (OSError, HTTPException) as error:
            reason = error
    raise UserError(f"{url} cannot be fetched: {reason}; run again, what was fetched is kept")


def fetch_coco(root, images):
    """Fetch the files that load_coco(root, images) needs and lacks, 16 images at a time. Raises UserError at
    the first failure; keeps what was fetched."""
    def get(path):
        atomic_write(path, fetch(f"{COCO_URL}/train2017/{quote(path.name)}"))

    with locked(root):
        if not is_file(root / CAPTIONS):
            url = f"{COCO_URL}/annotations/annotations_trainval2017.zip"
            try:
                atomic_write(root / CAPTIONS, ZipFile(BytesIO(fetch(url))).read(CAPTIONS))
            except (BadZipFile, KeyError) as error:  # such as the page of a network that asks for a login
                raise UserError(f"{url} is no zip file with {CAPTIONS}: {error}") from error
        files, captions = parse_captions((root / CAPTIONS).read_bytes(), root / CAPTIONS)
        names = [Path(name).name for image, name in sorted(files.items()) if image in captions]
        paths = [root / "train2017" / name for name in names[:images or None]]
        missing = [path for path in paths if not is_file(path)]
        with ThreadPool(16) as pool:  # daemon threads: Ctrl-C does not wait
            list(tqdm(pool.imap(get, missing), "fetch", len(missing), disable=not missing))


def run_command(command, memory="the load of this machine"):
    """command() -> its exit code. On an error, prints a sentence -> 2 for what the user can mend (`memory`:
    what to lower), 1 for a number that is not finite, 130 for Ctrl-C."""
    code = 2
    try:
        return command() or 0
    except KeyboardInterrupt:
        code, text = 130, "interrupted; what was finished is on the disk"
    except FloatingPointError as error:
        code, text = 1, error
    except UserError as error:
        text = error
    except OSError as error:
        lacks = errno.EINVAL, errno.ENODEV, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP  # of network disks
        hint = "; does its disk have file locks, mmap and fsync?" * (error.errno in lacks)
        text = f"{error.filename or 'a file'} cannot be written or read: {error.strerror or error}{hint}"
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(OUT_OF_MEMORY, str(error)):
            raise
        text = f"out of memory; lower {memory}\n  ({str(error)[:200]})"
    print(f"error: {text}", file=sys.stderr)
    return code


@contextmanager
def locked(folder, wait=False):
    """Make a folder and hold its lock, freed at any end of the process. If taken: wait, or UserError."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with named(folder), open(Path(folder) / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise UserError(f"another run writes to {folder}: wait, or name another folder") from None
            print(f"waiting for another process that is writing to {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def named(path):
    """A block that adds this name to OSErrors without one: those of read, write, flock and mmap."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def is_file(path):
    """Whether a regular file is there: no folder, no pipe (reading it might never end). Raises OSError if the
    disk fails; Path.is_file may say no."""
    with suppress(FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no name for a file
        return stat.S_ISREG(path.stat().st_mode)


def read_file(path):
    """The bytes of a file, or None if there is none. Raises an OSError with its name if it cannot be read."""
    with named(path):
        return path.read_bytes() if is_file(path) else None


@contextmanager
def replacing(path):
    """A file to write bytes to. It replaces `path` when the block ends: `path` is never half written."""
    part = path.with_name(path.name + ".tmp")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with named(path), open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)  # it would be in the way on a full disk
        raise


def atomic_write(path, content):
    """Write these bytes to `path`, or on an error leave it as it was."""
    with replacing(path) as file:
        file.write(content)


def write_json(path, content):
    """`content` as JSON, atomically. Raises ValueError for a number that is not finite."""
    atomic_write(path, json.dumps(content, indent=1, allow_nan=False).encode())


def save_figure(figure, path):
    """A Matplotlib figure as PNG, atomically."""
    figure.savefig(file := BytesIO(), dpi=100)
    atomic_write(path, file.getbuffer())


def digest(*contents):
    """A hash of bytes and of what JSON can hold, as 32 hexadecimal digits."""
    parts = [content if isinstance(content, bytes) else json.dumps(content).encode() for content in contents]
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def describe(counts):
    """{what: how many} in words."""
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "none"


def number(kind, least, most=sys.float_info.max):
    """add_argument's type and metavar for a number from `least` to `most`. Refuses nan and infinity."""
    def parse(text):
        if not least <= (value := kind(text)) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not in the range {shown}")
        return value
    shown = f"{least}.." if most == sys.float_info.max else f"{least}..{most}"
    parse.__name__ = kind.__name__  # argparse: "invalid float value"
    return {"type": parse, "metavar": shown}


def check(coco, mvsa):
    """Look for both before hours are spent on one. Raises UserError for what is missing."""
    load_coco(coco)
    for folder in find_mvsa(mvsa).values():
        load_mvsa(folder)


def run(argv=None):
    """Run a command of those at the top of this file -> exit code; see run_command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    toy = commands.add_parser("toy", help="write the toy data")
    toy.add_argument("root", metavar="dir", type=Path, help="folder to make")
    both = commands.add_parser("check", help="look for the data")
    both.add_argument("--coco", required=True, help="folder with train2017/ and annotations/")
    both.add_argument("--mvsa", required=True, help="folder with one or both MVSA sets")
    coco = commands.add_parser("coco", help="fetch COCO 2017's captions and images")
    coco.add_argument("root", metavar="dir", type=Path, help="folder to make")
    coco.add_argument("--images", **number(int, 0), default=10000, help="how many (10000; 0: all, 19 GB)")
    options = vars(parser.parse_args(argv))  # the command and its function's arguments
    function = {"toy": write_toy, "check": check, "coco": fetch_coco}[options.pop("command")]
    return run_command(lambda: function(**options))


if __name__ == "__main__":
    sys.exit(run())
