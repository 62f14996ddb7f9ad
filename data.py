"""Everything that touches the disk: COCO captions, MVSA posts, published splits, and the toy world in both layouts.

    python data.py toy DIR                        write the toy data: DIR/coco and DIR/mvsa, in the official layouts
    python data.py check --coco DIR --mvsa DIR    say what is there, or what is missing and where it is to be had

One image-caption pair goes: COCO's json -> `CocoCaptions.items` -> `feature_cache` has f_I and f_T encode it, once ->
`epoch_batches` draws its index and caption -> `FeatureCache` reads what was encoded -> the loop in pretrain.py. With
`--cache off`, `Pictures` decodes and preprocesses it each time it is drawn, and the loop encodes it.
"""
import argparse
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import struct
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm.data
import torch
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold, train_test_split
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

LABELS = ("positive", "neutral", "negative")  # in CLMLF's order: emotion_label 0, 1, 2
COCO_HELP = "run `make coco COCO=DIR`, or download train2017.zip and annotations_trainval2017.zip from cocodataset.org"
MVSA_HELP = ("MVSA must be downloaded by hand: http://www.mcrlab.net/research/mvsa-sentiment-analysis-on-multi-view-"
             "social-data/ or, on Kaggle, vincemarcs/mvsasingle and vincemarcs/mvsamultiple")
# What Pillow raises on files that are not the image they claim to be
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class DataError(Exception):
    """The data are missing or not what they should be; the message names the file and what to do."""


def exit_code(command, mend, memory):
    """Run command() for a script -> its exit code, with a sentence on stderr in place of a traceback where it fails in a way
    that the user can do something about: 2 for the errors `mend`, a full or unwritable disk, and too little memory (`memory`
    names the options to lower); 1 for a loss that is not finite; 130 for Ctrl-C."""
    try:
        return command()
    except mend as error:
        code, text = 2, error
    except FloatingPointError as error:
        code, text = 1, error
    except KeyboardInterrupt:
        code, text = 130, "interrupted; the feature cache, the last checkpoint and the answers of finished seeds are kept"
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        code, text = 2, (f"{error.filename or 'a file of --out or --cache'} cannot be written or read: {error.strerror}; "
                         "make room, mend its rights, or name another folder with --out or --cache")
    except (MemoryError, RuntimeError) as error:
        # torch has a class of its own for a full GPU, and on a CPU says it in a RuntimeError
        known = ("can't allocate memory", "DataLoader worker (pid")  # the second: the system killed it, which is why it does
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(text in str(error) for text in known):
            raise
        code, text = 2, f"out of memory; lower {memory}\n  ({str(error).splitlines()[0] if str(error) else 'MemoryError'})"
    print(f"error: {text}", file=sys.stderr)
    return code


def make_folder(path, option):
    """Make the folder that `option` names if it is not there, and return it as a Path. Raises DataError if it cannot be
    written to."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return Path(path)
    except OSError as error:
        raise DataError(f"{option} {path} is no folder that can be written to ({error.strerror}); name another") from error


@contextmanager
def whole_file(path):
    """A binary file to write under a temporary name, renamed to `path` when all of it is on the disk: whoever reads `path`
    finds the old content or the new, at whatever moment this process or the machine stops."""
    part = path.with_name(path.name + ".tmp")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save hides the error of a full disk behind one of its own
        found = error if isinstance(error, OSError) else error.__context__
        if not isinstance(found, OSError):
            raise
        found.filename = str(path)
        raise found
    finally:
        part.unlink(missing_ok=True)  # still there only after an error: on a full disk it would be in the way
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the new name, too
    os.close(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Images


def image_transform(data_config):
    """PIL image -> [3, H, W] float tensor: size, interpolation, mean and std of the encoder's own timm data config.

    The picture is squashed to the input size, not cropped (as in the authors' scripts): a caption may speak of its edges.
    """
    return timm.data.create_transform(**data_config, crop_pct=1.0, crop_mode="squash")


def read_image(path, size=None):
    """Path -> RGB image. Raises one of BROKEN if it cannot be decoded to the last pixel.

    `size` (height, width) is what it will be scaled to: a JPEG more than twice that is decoded at a half, quarter or eighth
    of its size, never below twice `size`, which costs a fraction and leaves the scaling enough to average over. Of an
    animation it is the first picture; what is transparent is white.
    """
    with Image.open(path) as image:
        if size:
            image.draft(None, (2 * size[1], 2 * size[0]))  # does nothing for other formats
        if image.mode.startswith("I"):  # 16 bits a pixel, or 16 in 32: Pillow's own conversion would clip at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")


def describe(counts):
    """{what: how many} in words."""
    return ", ".join(f"{number} {what}" for what, number in counts.items()) or "none"


@dataclass
class LeftOut:
    """What was not used, by reason, with names: nothing is dropped silently."""
    reasons: dict = field(default_factory=dict)  # reason -> set of names

    def add(self, reason, name):
        """Count `name` once; a broken image is printed the first time it is met."""
        names = self.reasons.setdefault(reason, set())
        if reason == "broken image" and name not in names:
            print(f"left out, cannot be read: {name}", file=sys.stderr)
        names.add(name)

    def add_broken(self, batch, items):
        """Count what a RawBatch or FeatureBatch of `items` (path, texts) left out."""
        for image in batch.left_out:
            self.add("broken image", str(items[image][0]))

    def merge(self, other):
        """What both name, as another LeftOut."""
        return LeftOut({reason: self.reasons.get(reason, set()) | other.reasons.get(reason, set())
                        for reason in {**self.reasons, **other.reasons}})

    def counts(self):
        """{reason: how many}"""
        return {reason: len(names) for reason, names in self.reasons.items()}

    def __str__(self):
        return describe(self.counts())


# ---------------------------------------------------------------------------------------------------------------------
# COCO captions


def coco_paths(root):
    """COCO 2017's (image folder, caption file) below `root`. Raises DataError naming what is missing."""
    images, captions = Path(root) / "train2017", Path(root) / "annotations" / "captions_train2017.json"
    missing = [str(path) for path, found in ((images, images.is_dir()), (captions, captions.is_file())) if not found]
    if missing:
        raise DataError(f"COCO 2017 not found: looked for {' and '.join(missing)}\n  {COCO_HELP}")
    return images, captions


def parse_captions(content, name):
    """The bytes of COCO's caption file -> ({image id: file name}, {image id: captions}, ids of images that have captions but
    are not listed). Raises DataError, with the file's `name`, for anything that is not such a file."""
    try:
        parsed = json.loads(content)
        images = [(image["id"], image["file_name"]) for image in parsed["images"]]
        notes = [(note["image_id"], note["caption"].strip()) for note in parsed["annotations"]]
        # In Python 1 == 1.0 == True, and text that is half of a surrogate pair is no text: neither may be taken for another.
        if not all(type(i) is int and type(text) is str and text.encode() is not None for i, text in images + notes):
            raise TypeError("an id that is not a whole number, or a file name or caption that is not a text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{name} is not a COCO caption file: {error!r}; fetch it again: {COCO_HELP}") from error
    files, captions = dict(images), {}
    if len(files) < len(images):
        raise DataError(f"{name} lists image id {Counter(i for i, _ in images).most_common(1)[0][0]} twice")
    for image, caption in notes:
        captions.setdefault(image, []).append(caption)
    return files, captions, sorted(captions.keys() - files.keys())


class CocoCaptions:
    """Images and their captions. `items[i]` is (path, captions), in the order of the image ids.

    An image that is listed but not on disk, or has no caption, or is not listed and has one, is counted in `left_out`.
    `limit` keeps the first so many (0: all). Raises DataError if the annotations are not COCO's or nothing is left.
    """

    def __init__(self, root, limit=0):
        folder, annotations = coco_paths(root)
        names, captions, unlisted = parse_captions(annotations.read_bytes(), annotations)
        on_disk = {path.name for path in folder.iterdir()}
        self.items, self.left_out = [], LeftOut()
        for image_id in unlisted:
            self.left_out.add("captioned image not listed", str(image_id))
        for image_id, name in sorted(names.items()):
            if name not in on_disk:
                self.left_out.add("image not on disk", name)
            elif image_id not in captions:
                self.left_out.add("image without caption", name)
            elif not limit or len(self.items) < limit:
                self.items.append((folder / name, captions[image_id]))
        if not self.items:
            raise DataError(f"no image of {folder} has a caption in {annotations}; left out: {self.left_out}")

    def read(self):
        """What a run reads: {"images": ..., "captions": ...}, without the images that were found broken so far."""
        broken = self.left_out.reasons.get("broken image", ())
        whole = [texts for path, texts in self.items if str(path) not in broken]
        return {"images": len(whole), "captions": sum(map(len, whole))}

    def fingerprint(self):
        """A hash of the file names and captions, in their order: the same if they are the same, in whatever folder."""
        return hashlib.blake2b(json.dumps([(path.name, texts) for path, texts in self.items]).encode(),
                               digest_size=16).hexdigest()

    def hold_out(self, count):
        """Indices of the items to train on, and of `count` others to measure on. Always the same ones, whatever the seed
        of a run, so that runs compare. Raises DataError if that leaves nothing to train on."""
        if count >= len(self.items):
            raise DataError(f"--held_out {count} leaves nothing of {len(self.items)} images to train on")
        order = np.random.default_rng(0).permutation(len(self.items))
        return np.sort(order[count:]), np.sort(order[:count])


def epoch_batches(items, train, batch_size, seed, epoch):
    """The batches of one epoch over the indices `train`: lists of draws (image, whose caption, which caption), where the
    caption is the image's own. Pure function of its arguments.

    Each image comes once, in a new order, with one of its captions drawn at random. The last batch is dropped if it is
    not full, unless it is the only one.
    """
    rng = np.random.default_rng([seed, epoch])
    draws = [(int(i), int(i), int(rng.integers(len(items[i][1])))) for i in rng.permutation(train)]
    batches = [draws[start:start + batch_size] for start in range(0, len(draws), batch_size)]
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) < batch_size else batches


# ---------------------------------------------------------------------------------------------------------------------
# Batches: decoded each time they are drawn, or what the frozen encoders said of them, from disk. Both give the loop
# `.features(net)` -> s_image [B, N, D_I], s_text [B, L, D_T], text_mask [B, L] on the model's device.


class RawBatch(NamedTuple):
    """B pictures and B texts, still to be encoded."""
    images: torch.Tensor  # [B, 3, H, W]
    texts: list
    left_out: list  # item indices of pictures that were drawn and cannot be read

    @property
    def size(self):
        return len(self.texts)

    def features(self, net):
        return net.frozen(self.images, self.texts)


class FeatureBatch(NamedTuple):
    """What f_I and f_T said of B pictures and texts."""
    s_image: torch.Tensor  # [B, N, D_I]
    s_text: torch.Tensor  # [B, L, D_T], zeros where there is no token
    text_mask: torch.Tensor  # [B, L] bool
    left_out: list  # as above

    @property
    def size(self):
        return len(self.s_image)

    def features(self, net):
        s_image, s_text, text_mask = (part.to(net.device, non_blocking=True) for part in self[:3])
        return s_image.to(net.dtype), s_text.to(net.dtype), text_mask


class Pictures(Dataset):
    """items: (path, texts). A list of draws (image, whose text, which text) -> RawBatch, without the pictures that cannot
    be read. For a DataLoader with batch_size=None: its workers make whole batches."""

    def __init__(self, items, data_config):
        self.items, self.transform, self.size = items, image_transform(data_config), data_config["input_size"]

    def __getitem__(self, draws):
        images, texts, left_out = [], [], []
        for image, owner, text in draws:
            try:
                picture = read_image(self.items[image][0], self.size[1:])
            except BROKEN:
                left_out.append(image)
                continue
            images.append(self.transform(picture))
            texts.append(self.items[owner][1][text])
        return RawBatch(torch.stack(images) if images else torch.empty(0, *self.size), texts, left_out)


def make_loader(source, draws, workers, device):
    """A DataLoader of Pictures or a FeatureCache over lists of draws, each a batch, read ahead by `workers` processes."""
    return DataLoader(source, batch_size=None, sampler=draws, num_workers=workers, pin_memory=device.type == "cuda",
                      worker_init_fn=leave_signals)


def leave_signals(worker):
    """Ctrl-C goes to every process of a terminal, but what it means is for the main one to say."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ---------------------------------------------------------------------------------------------------------------------
# The feature cache: f_I and f_T are frozen and pictures are not augmented, so each is encoded once

ENCODE_BATCH = 32  # fixed, so that the bytes of a cache do not depend on where its making was cut off
ON_DISK = {"float16": np.float16, "float32": np.float32, "bfloat16": np.int16}  # numpy has no bfloat16: its bits


def first_texts(items):
    """items: (path, texts) -> [I + 1]: the number of each item's first text, when all texts are counted through."""
    return np.concatenate([[0], np.cumsum([len(texts) for _, texts in items])])


class FeatureCache(Dataset):
    """What f_I and f_T say of items, in a folder: a list of draws -> FeatureBatch, as `Pictures` gives a RawBatch.

        recipe.json   what it was made from, and the indices of the images that cannot be read
        image.bin     [I, N, D_I]     f_I's patch tokens
        text.bin      [tokens, D_T]   f_T's token states of all texts, one text after the other
        offsets.npy   [texts + 1]     where in text.bin each text begins
    """

    def __init__(self, folder, items, recipe):
        stored = json.loads((folder / "recipe.json").read_text())
        self.broken = set(stored.pop("broken"))
        differs = [key for key in {*stored, *recipe} if stored.get(key) != recipe.get(key)]
        if differs:
            raise DataError(f"{folder} is not the feature cache its name says, it differs in {', '.join(sorted(differs))}; "
                            "remove it")
        self.folder, self.items, self.dtype = folder, items, recipe["dtype"]
        self.image_shape, self.text_shape = recipe["image_shape"], recipe["text_shape"]
        self.offsets = np.load(folder / "offsets.npy")
        self.first = first_texts(items)

    def array(self, name, shape):
        """A file of the folder as a memory map, opened for each batch: pages that were read do not pile up as the
        process's own."""
        return np.memmap(self.folder / name, ON_DISK[self.dtype], "r", shape=tuple(shape))

    def tensor(self, array):
        tensor = torch.from_numpy(np.array(array))
        return tensor.view(torch.bfloat16) if self.dtype == "bfloat16" else tensor

    def __getitem__(self, draws):
        whole = [draw for draw in draws if draw[0] not in self.broken]
        s_image = self.tensor(self.array("image.bin", self.image_shape)[[image for image, _, _ in whole]])  # [B, N, D_I]
        tokens = self.array("text.bin", self.text_shape)
        texts = [self.first[owner] + text for _, owner, text in whole]
        texts = [self.tensor(tokens[self.offsets[text]:self.offsets[text + 1]]) for text in texts]  # B x [L_b, D_T]
        if not whole:
            return FeatureBatch(s_image, s_image, s_image, [image for image, _, _ in draws])
        s_text = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)  # [B, L, D_T]
        lengths = torch.tensor([len(text) for text in texts])
        text_mask = torch.arange(s_text.shape[1]) < lengths[:, None]  # [B, L]
        return FeatureBatch(s_image, s_text, text_mask, [image for image, _, _ in draws if image in self.broken])


def cache_recipe(items, net, pictures, dtype):
    """Everything that decides what is in a cache, and where its texts begin: (recipe, offsets [texts + 1]).

    Texts count by their tokens, so another tokenizer or caption makes another cache; files by path, size and time.
    """
    lengths, digest = [0], hashlib.blake2b(digest_size=16)
    texts = [text for _, texts in items for text in texts]
    for start in range(0, len(texts), 1000):
        for tokens in net.text_encoder.tokens(texts[start:start + 1000])["input_ids"]:
            lengths.append(len(tokens))
            digest.update(np.array([len(tokens), *tokens]))
    offsets = np.cumsum(lengths)
    files = hashlib.blake2b(digest_size=16)
    for path, texts in items:
        found = os.stat(path)
        files.update(f"{path.name} {found.st_size} {found.st_mtime_ns} {len(texts)}\n".encode())
    N = net.grid[0] * net.grid[1]
    recipe = {"image_encoder": net.config.image_encoder, "text_encoder": net.config.text_encoder,
              "encoder_weights": net.fingerprint(), "encoder_precision": str(net.dtype),
              "preprocessing": f"draft to {2 * max(pictures.size)}, {pictures.transform}",
              "files": files.hexdigest(), "texts": digest.hexdigest(), "dtype": dtype,
              "image_shape": [len(items), N, net.image_encoder.dim],
              "text_shape": [int(offsets[-1]), net.text_encoder.dim]}
    return recipe, offsets


def feature_cache(root, items, net, dtype, workers):
    """The FeatureCache of `items` (path, texts) below `root`, made if it is not there yet. Its folder is named by a hash of
    its recipe, so what was made of other encoders, files, texts or preprocessing is never met.

    Two processes that need the same one: the second waits. Raises DataError if the disk has too little room.
    """
    pictures = Pictures(items, net.image_encoder.data_config)
    recipe, offsets = cache_recipe(items, net, pictures, dtype)
    folder = Path(root) / hashlib.blake2b(json.dumps(recipe).encode(), digest_size=8).hexdigest()
    if not folder.is_dir():
        with open(make_folder(root, "--cache") / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the system however the process ends
            if not folder.is_dir():
                make_cache(folder, pictures, net, recipe, offsets, workers)
    cache = FeatureCache(folder, items, recipe)
    most = net.text_encoder.max_tokens
    cut = int((np.diff(offsets) >= most).sum())
    print(f"features: {folder}, {len(items)} images, {len(offsets) - 1} texts, {len(cache.broken)} broken images"
          + (f"; {cut} texts have {most} tokens or more, of which f_T reads {most}" if cut else ""))
    return cache


def open_source(cache, items, net, dtype, workers):
    """What the loops draw batches from: the FeatureCache of `items` below the folder `cache`, or their Pictures if it is
    "off"."""
    if cache == "off":
        return Pictures(items, net.image_encoder.data_config)
    return feature_cache(cache, items, net, dtype, workers)


def make_cache(folder, pictures, net, recipe, offsets, workers):
    """Encode everything into `folder`.part, going on where an earlier call stopped, and rename it when whole."""
    part, items = folder.with_suffix(".part"), pictures.items
    images, broken, sizes = 0, [], [0, 0]  # done so far: images, those that cannot be read, bytes of the two files
    if (part / "progress.json").is_file():
        images, broken, sizes = json.loads((part / "progress.json").read_text())
    itemsize = np.dtype(ON_DISK[recipe["dtype"]]).itemsize
    needed = sum(int(np.prod(recipe[shape])) for shape in ("image_shape", "text_shape")) * itemsize + offsets.nbytes
    free = shutil.disk_usage(folder.parent).free
    room = f"the feature cache of {len(items)} images takes {needed / 1e9:.3g} GB in {folder.parent}"
    full = DataError(f"{room}, where {free / 1e9:.3g} GB are free: name another folder with --cache DIR, or encode every "
                     "time with --cache off")
    if needed - sum(sizes) > free:
        raise full
    print(f"{room} ({free / 1e9:.3g} GB are free)" + (f"; going on at image {images}" if images else ""))
    part.mkdir(exist_ok=True)
    first = first_texts(items)
    starts = range(images, len(items), ENCODE_BATCH)
    chunks = [[(i, i, 0) for i in range(start, min(start + ENCODE_BATCH, len(items)))] for start in starts]
    loader = make_loader(pictures, chunks, workers, net.device)
    try:
        with open(part / "image.bin", "ab") as image_file, open(part / "text.bin", "ab") as text_file, \
                tqdm(total=len(items), initial=images, desc="encode", unit="image") as bar:
            files = (image_file, text_file)
            for file, size in zip(files, sizes):
                file.truncate(size)
            for chunk, batch in zip(chunks, loader):
                whole = [i for i, _, _ in chunk if i not in batch.left_out]
                s_image = torch.zeros(len(chunk), *recipe["image_shape"][1:], dtype=net.dtype)
                if whole:
                    s_image[[i - chunk[0][0] for i in whole]] = net.frozen_image(batch.images).cpu().to(net.dtype)
                image_file.write(to_disk(s_image, recipe["dtype"]))
                texts, begin = [text for i, _, _ in chunk for text in items[i][1]], first[chunk[0][0]]
                for start in range(0, len(texts), ENCODE_BATCH):
                    s_text, mask = net.frozen_text(texts[start:start + ENCODE_BATCH])
                    lengths = np.diff(offsets[begin + start:begin + start + len(mask) + 1])
                    assert mask.sum(1).tolist() == lengths.tolist()  # or later texts would be read from the wrong place
                    text_file.write(to_disk(s_text[mask], recipe["dtype"]))
                for file in files:
                    file.flush()
                    os.fsync(file.fileno())
                broken += batch.left_out
                with whole_file(part / "progress.json") as file:
                    file.write(json.dumps([chunk[-1][0] + 1, broken, [f.tell() for f in files]]).encode())
                bar.update(len(chunk))
        np.save(part / "offsets.npy", offsets)
        with whole_file(part / "recipe.json") as file:
            file.write(json.dumps({**recipe, "broken": broken}, indent=1).encode())
    except (OSError, DataError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOSPC:
            raise
        shutil.rmtree(part)  # what cannot be finished must not fill the disk
        raise (full if isinstance(error, OSError) else error) from error
    os.replace(part, folder)


def to_disk(tensor, dtype):
    """A tensor -> its bytes as `dtype`. Raises DataError for what float16 cannot hold."""
    tensor = tensor.cpu().to(getattr(torch, dtype)).contiguous()
    if not tensor.isfinite().all():
        raise DataError(f"the encoders' features do not fit {dtype}; use --cache_dtype bfloat16 or float32")
    return tensor.view(torch.uint8).numpy().tobytes()


# ---------------------------------------------------------------------------------------------------------------------
# MVSA


@dataclass
class Post:
    """One post. Ids clash between the two sets, so a post's key is (set, id)."""
    set: str  # "single" or "multi"
    id: str
    image: Path
    text: str
    label: int  # index into LABELS


def find_mvsa(root):
    """{"single": folder, "multi": folder}, or one of them: every folder at `root` or up to two levels below it that
    holds labelResultAll.txt and data/, whatever its name; which set it is, its header tells.

    Raises DataError if there is none, or two of a kind.
    """
    root, found = Path(root), {}
    patterns = ["labelResultAll.txt", "*/labelResultAll.txt", "*/*/labelResultAll.txt"]
    for labels in (path for pattern in patterns for path in sorted(root.glob(pattern))):
        if not (labels.parent / "data").is_dir():
            raise DataError(f"{labels} is there, but no folder {labels.parent / 'data'} with the posts\n  {MVSA_HELP}")
        kind = "single" if annotators(labels, read_rows(labels)) == 1 else "multi"
        if kind in found:
            raise DataError(f"two folders hold MVSA-{kind}: {found[kind]} and {labels.parent}; keep one")
        found[kind] = labels.parent
    if not found:
        raise DataError(f"MVSA not found: looked for {', '.join(str(root / p) for p in patterns)}\n  {MVSA_HELP}")
    return found


def read_rows(labels):
    """labelResultAll.txt -> (line number, tab-separated fields) of its non-empty lines, header first."""
    try:
        text = labels.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{labels} is not the label file: {error}") from error
    lines = re.split(r"\r\n|\n|\r", text)  # not splitlines(): it splits at a dozen other characters, too
    return [(n, [part.strip() for part in line.split("\t")]) for n, line in enumerate(lines, start=1) if line.strip()]


def annotators(labels, rows):
    """1 (Single) or 3 (Multi), from the header `ID<tab>text,image[<tab>text,image<tab>text,image]` in read_rows' first."""
    header = [part.lower().replace(" ", "") for part in rows[0][1]] if rows else []
    if header[:1] != ["id"] or set(header[1:]) != {"text,image"} or len(header) not in (2, 4):
        raise DataError(f"{labels}: the first line must be ID and one or three times text,image, not {str(header)[:100]}")
    return len(header) - 1


def majority(votes):
    """The word that more than half of the votes name, or None."""
    word, count = Counter(votes).most_common(1)[0]
    return word if 2 * count > len(votes) else None


def combine(text, image):
    """MVSA's label of a post from those of its parts: equal keeps, neutral with polar gives the polar one, positive with
    negative gives None (Niu et al. 2016, as in CLMLF and all later work)."""
    if text == image or image == "neutral":
        return text
    return image if text == "neutral" else None


def read_labels(labels):
    """labelResultAll.txt -> ({id: label}, {id: reason}) of the posts kept and dropped. Raises DataError on anything else
    than the documented format, with the line number."""
    rows = read_rows(labels)
    count, kept, dropped = annotators(labels, rows), {}, {}
    for line, (post, *votes) in rows[1:]:
        votes = [tuple(word.strip().lower() for word in vote.split(",")) for vote in votes]
        if not post or len(votes) != count or any(len(vote) != 2 or not set(vote) <= set(LABELS) for vote in votes):
            raise DataError(f"{labels}, line {line}: not an id and {count} times text,image with {', '.join(LABELS)}")
        if post in kept or post in dropped:
            raise DataError(f"{labels}, line {line}: id {post} is there a second time")
        text, image = (majority(part) for part in zip(*votes))
        label = combine(text, image) if text and image else None
        if label:
            kept[post] = LABELS.index(label)
        else:
            dropped[post] = "text and image of opposite polarity" if text and image else "no majority"
    return kept, dropped


def decode(content):
    """A raw post -> text. The files are a mixture of UTF-8 and GBK-family bytes; Latin-1 takes whatever is left."""
    utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))  # the GBK family would read it as other words
    for encoding in ("utf-16",) * utf16 + ("utf-8-sig", "gb18030"):
        try:
            return content.decode(encoding).strip()
        except UnicodeDecodeError:
            pass  # the next encoding
    return content.decode("latin-1").strip()


def load_mvsa(folder):
    """One MVSA folder -> (posts in the order of the label file, LeftOut). Images are only looked for, not decoded."""
    folder = Path(folder)
    labels = folder / "labelResultAll.txt"
    kind = "single" if annotators(labels, read_rows(labels)) == 1 else "multi"
    kept, dropped = read_labels(labels)
    posts, left_out = [], LeftOut()
    for post, reason in dropped.items():
        left_out.add(reason, post)
    on_disk = {path.name for path in (folder / "data").iterdir()}
    for post, label in kept.items():
        if f"{post}.jpg" not in on_disk or f"{post}.txt" not in on_disk:
            left_out.add("text or image file missing", post)
            continue
        text = decode((folder / "data" / f"{post}.txt").read_bytes())
        posts.append(Post(kind, post, folder / "data" / f"{post}.jpg", text, label))
    if not posts:
        raise DataError(f"none of the posts of {labels} can be used; left out: {left_out}\n  {MVSA_HELP}")
    return posts, left_out


def stratified_split(labels, seed):
    """Labels [P] -> indices of train, validation and test, 8:1:1, each with the classes' shares of the whole."""
    labels = np.asarray(labels)
    try:
        train, rest = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=seed, stratify=labels)
        validation, test = train_test_split(rest, test_size=0.5, random_state=seed, stratify=labels[rest])
    except ValueError as error:  # scikit-learn: a class has too few posts to be in every part
        raise DataError(f"cannot split {len(labels)} posts 8:1:1 by label "
                        f"({dict(Counter(LABELS[label] for label in labels))}): {error}") from error
    return train, validation, test


def random_split(labels, seed):
    """Labels [P] -> indices of train, validation and test, 8:1:1, at random: no look at the labels (the authors' way)."""
    order = np.random.default_rng(seed).permutation(len(labels))
    tenth = len(order) // 10
    return order[2 * tenth:], order[:tenth], order[tenth:2 * tenth]


def upsample(train, labels, seed):
    """Indices of training posts -> the same and, of each class, randomly repeated ones until it is as frequent as the
    most frequent."""
    rng, classes = np.random.default_rng(seed), np.asarray(labels)[train]
    counts = np.bincount(classes)
    repeated = [rng.choice(train[classes == label], counts.max() - count) for label, count in enumerate(counts) if count]
    return np.concatenate([train, *repeated])


def plain_words(text):
    """A text without links, mentions, punctuation and case: what is left when a post is sent again."""
    text = re.sub(r"https?\S+|www\.\S+|\brt\s+@\w+|@\w+", " ", text.lower())
    return " ".join(re.sub(r"[\W_]+", " ", text).split())


def duplicate_groups(posts):
    """Posts -> [P] group numbers: the same for posts whose images are the same bytes, whose texts are the same words (see
    plain_words; no words are not the same words), or who are linked by a chain of such."""
    first, edges = {}, []
    for i, post in enumerate(posts):
        words = plain_words(post.text)
        keys = [("image", hashlib.blake2b(post.image.read_bytes()).digest())] + [("text", words)] * bool(words)
        edges += [(i, first.setdefault(key, i)) for key in keys]
    edges = np.array(edges)
    graph = coo_array((np.ones(len(edges)), edges.T), shape=(len(posts), len(posts)))
    return connected_components(graph, directed=False)[1]


def grouped_split(labels, groups, seed):
    """Labels and group numbers [P] -> indices of train, validation and test, 8:1:1 as nearly as whole groups and equal
    shares of the classes allow."""
    try:
        folds = StratifiedGroupKFold(10, shuffle=True, random_state=seed).split(labels, labels, groups)
        test, validation, *train = [test for _, test in folds]
    except ValueError as error:
        raise DataError(f"cannot split {len(labels)} posts by group: {error}") from error
    return np.concatenate(train), validation, test


def published_split(folder, posts):
    """Indices into `posts` of train, validation and test by CLMLF's train.json, dev.json and test.json, and a Counter of
    what did not match. `posts` are of one set. The files may lie in `folder` itself or in a folder below it whose path
    tells the set ("single" or "multi"), as in CLMLF's own repository. Raises DataError if they do not fit.
    """
    folder, kind = Path(folder), posts[0].set
    homes = [path.parent for path in sorted(folder.rglob("train.json"))]
    named = [home for home in homes if kind in str(home.relative_to(folder.parent)).lower()]
    homes = named or [home for home in homes if home == folder]
    if len(homes) != 1:
        raise DataError(f"--split {folder}: looked for one train.json of MVSA-{kind}, in it or in a folder below with "
                        f"'{kind}' in its path; found {len(homes)}: {', '.join(map(str, homes))}")
    index, notes, parts, seen = {post.id: i for i, post in enumerate(posts)}, Counter(), [], set()
    for name in ("train.json", "dev.json", "test.json"):
        try:
            entries = json.loads((homes[0] / name).read_text(encoding="utf-8"))
            listed = [(str(entry["id"]), int(entry["emotion_label"])) for entry in entries]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{homes[0] / name} is not a list of id, text, emotion_label: {error!r}") from error
        here = [(index[post], label) for post, label in listed if post in index]
        notes["listed, but not among the posts"] += len(listed) - len(here)
        notes["labelled otherwise there"] += sum(posts[i].label != label for i, label in here)
        notes["listed twice"] += sum(i in seen for i, _ in here)
        seen.update(i for i, _ in here)
        parts.append(np.array([i for i, _ in here], dtype=int))
    notes["not listed, so not used"] = len(posts) - len(seen)
    if notes["listed twice"] or min(map(len, parts)) == 0 or notes["labelled otherwise there"] * 20 > len(seen):
        raise DataError(f"--split {homes[0]} is not a split of MVSA-{kind}: {dict(notes)}, "
                        f"sizes {[len(part) for part in parts]}")
    return parts, notes


# ---------------------------------------------------------------------------------------------------------------------
# The toy world
#
# A picture is four things on a grey ground, two above two; a thing is a texture: one of 3 colours in one of 3 patterns,
# all equally likely at each place, so what a masked thing is cannot be known from the rest of the picture. The caption
# names the four in reading order, each colour by one of 12 words: what the words mean is seen only beside pictures.
# Colours have moods. A post's picture has the mood of most of its things; its text, which speaks of other things than the
# picture shows, has the mood of the thing it names first. MVSA's rules make the label of both, so it needs both.

COLOURS = (  # in the order of LABELS: the moods
    ((60, 200, 60), "green lime olive emerald jade moss fern mint sage pine grass forest".split()),
    ((60, 90, 230), "blue navy azure cobalt sky indigo denim ocean sapphire cerulean ink lapis".split()),
    ((230, 60, 60), "red crimson scarlet ruby cherry brick rose wine coral cardinal maroon vermilion".split()))
PATTERNS = (("bars", "pillars", "columns"), ("stripes", "bands", "lines"), ("checks", "squares", "tiles"))


def toy_image(things, rng):
    """Four (colour, pattern) pairs -> 48 x 48 RGB image with pixel noise; a thing covers 2 x 2 patches of 8 pixels."""
    pixels = np.full((48, 48, 3), 128.0)
    y, x = np.mgrid[:16, :16] // 2  # stripes are two pixels wide
    for place, (colour, pattern) in enumerate(things):
        light = (x % 2, y % 2, (x + y) % 2)[pattern]
        top, left = 8 + 16 * (place // 2), 8 + 16 * (place % 2)
        pixels[top:top + 16, left:left + 16] = np.array(COLOURS[colour][0]) * (0.5 + 0.5 * light[:, :, None])
    return Image.fromarray((pixels + rng.normal(0, 12, pixels.shape)).clip(0, 255).astype(np.uint8))


def toy_text(things, rng):
    """Four (colour, pattern) pairs -> "scarlet bars navy tiles ...", each word drawn from its synonyms."""
    return " ".join(f"{rng.choice(COLOURS[colour][1])} {rng.choice(PATTERNS[pattern])}" for colour, pattern in things)


def toy_things(rng):
    """Four (colour, pattern) pairs, all equally likely."""
    return [tuple(map(int, rng.integers(3, size=2))) for _ in range(4)]


def toy_post(text_mood, image_mood, rng):
    """Two moods (indices into LABELS) -> (image, text) of a post: in the picture each thing has its mood with probability
    0.8, else any; in the text the thing named first has it, the others any."""
    shown = [(image_mood if rng.random() < 0.8 else colour, pattern) for colour, pattern in toy_things(rng)]
    (_, pattern), *others = toy_things(rng)
    return toy_image(shown, rng), toy_text([(text_mood, pattern), *others], rng)


def write_toy_coco(root, count, rng):
    """COCO's layout below `root`, with one broken image and one that is listed but not there."""
    (root / "train2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    images, notes = [], []
    for i in range(count + 2):
        things = toy_things(rng)
        images.append({"id": i, "file_name": f"{i:012d}.jpg", "width": 48, "height": 48})
        notes += [{"id": 5 * i + k, "image_id": i, "caption": toy_text(things, rng)} for k in range(5)]
        if i < count:
            toy_image(things, rng).save(root / "train2017" / images[i]["file_name"], quality=92)
    (root / "train2017" / images[count]["file_name"]).write_bytes(b"\xff\xd8 not a JPEG")
    text = json.dumps({"images": images, "annotations": notes})
    (root / "annotations" / "captions_train2017.json").write_text(text, encoding="utf-8")


def write_toy_mvsa(root, count, voters, rng):
    """MVSA's layout below `root`: `count` posts to keep, and conflicts, missing majorities (Multi), a broken image and a
    text that is not UTF-8."""
    (root / "data").mkdir(parents=True)
    lines, kept, number = ["\t".join(["ID"] + ["text,image"] * voters)], 0, 0
    while kept < count:
        number += 1
        text, image = (int(mood) for mood in rng.integers(3, size=2))
        votes = [[text, image] for _ in range(voters)]
        if voters == 3:
            votes[rng.integers(3)][rng.integers(2)] = int(rng.integers(3))  # one may disagree: the majority stands
            if number % 25 == 0:
                votes = [[vote, image] for vote in range(3)]  # three labels for the text, all different
        kept += bool(combine(LABELS[text], LABELS[image])) and not (voters == 3 and number % 25 == 0)
        lines.append("\t".join([str(number)] + [f"{LABELS[t]},{LABELS[i]}" for t, i in votes]))
        picture, words = toy_post(text, image, rng)
        (root / "data" / f"{number}.txt").write_bytes((words + " #caf\u00e9" * (number == 3)).encode("gb18030"))
        picture.save(root / "data" / f"{number}.jpg", quality=92)
    lines.append("\t".join([str(number + 1)] + ["positive,positive"] * voters))
    (root / "data" / f"{number + 1}.txt").write_text("red bars")
    (root / "data" / f"{number + 1}.jpg").write_bytes(b"")
    (root / "labelResultAll.txt").write_bytes("\r\n".join(lines + [""]).encode())


def write_toy(root, images=1100, posts=1000, seed=0):
    """Write the toy data: `root`/coco, `root`/mvsa/MVSA_Single (`posts` kept) and MVSA_Multiple (twice as many).

    The same arguments give the same bytes. Does nothing if the data are there from the same arguments.
    """
    root, recipe = Path(root), json.dumps({"images": images, "posts": posts, "seed": seed})
    done = root / "recipe.json"
    if done.is_file() and done.read_text() == recipe:
        return
    if root.exists():
        raise DataError(f"{root} exists, but not as toy data of {recipe}; remove it or name another folder")
    make_folder(root.parent, "the folder above")
    part, rng = root.with_name(root.name + ".part"), np.random.default_rng(seed)
    shutil.rmtree(part, ignore_errors=True)  # what an earlier call that was cut off has left
    write_toy_coco(part / "coco", images, rng)
    write_toy_mvsa(part / "mvsa" / "MVSA_Single", posts, 1, rng)
    write_toy_mvsa(part / "mvsa" / "MVSA_Multiple", 2 * posts, 3, rng)
    (part / "recipe.json").write_text(recipe)
    os.replace(part, root)


# ---------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    """The two commands of the top of this file. Returns the exit code: 2 for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    toy = commands.add_parser("toy", help="write the toy data", formatter_class=parser.formatter_class)
    toy.add_argument("dir", help="folder to make; gets coco/ and mvsa/")
    toy.add_argument("--images", type=int, default=1100, help="pictures with captions")
    toy.add_argument("--posts", type=int, default=1000, help="posts of MVSA-Single that are kept; Multi has twice as many")
    toy.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")
    check = commands.add_parser("check", help="say what data are there", formatter_class=parser.formatter_class)
    check.add_argument("--coco", required=True, help="folder with train2017/ and annotations/")
    check.add_argument("--mvsa", required=True, help="folder with one or both MVSA sets")
    return exit_code(lambda: run(parser.parse_args(argv)), DataError, "--images or --posts")


def run(args):
    """The command of the parsed arguments -> exit code 0. Raises DataError for what the user can mend."""
    if args.command == "toy":
        write_toy(args.dir, args.images, args.posts, args.seed)
        return 0
    missing = []
    for find, root in ((coco_paths, args.coco), (find_mvsa, args.mvsa)):
        try:
            find(root)
        except DataError as error:
            missing.append(str(error))
    if missing:
        raise DataError("\n".join(missing))
    return 0


if __name__ == "__main__":
    sys.exit(main())
