"""Pictures decoded in threads, a bounded number ahead of the model. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bitgen.config import BitGenConfig
from bitgen.dataset.images import available_cpus, load_image, prepare_image
from bitgen.errors import ImageError
from bitgen.inference.answers import Picture


def picture_pixels(picture: Picture, config: BitGenConfig) -> np.ndarray:
    """The square that the model sees of a picture, not yet normalised: uint8 `[3, S, S]`.

    Raises:
        ImageError: not a picture, or one that is too small or too large.
    """
    if isinstance(picture, (str, Path)):
        return load_image(picture, config.image_size, config.image_resize)
    return prepare_image(picture, config.image_size, config.image_resize)


def decoded_ahead(
    pictures: Iterable[Picture], config: BitGenConfig, ahead: int
) -> Generator[tuple[Picture, np.ndarray | ImageError], None, None]:
    """Each picture with its pixels, uint8 `[3, S, S]`, or why it cannot be read; in order.

    Files are decoded in one thread a core, at most `ahead` of them before they are asked for, so
    that memory stays the same however many there are. Open PIL pictures, which two threads must not
    read at once, are prepared in the caller's thread.
    """
    remaining = iter(pictures)
    waiting: deque[tuple[Picture, Future[np.ndarray | ImageError]]] = deque()
    executor = ThreadPoolExecutor(available_cpus(), "decode")
    try:
        while True:
            while len(waiting) <= ahead and (picture := next(remaining, None)) is not None:
                if isinstance(picture, (str, Path)):
                    future = executor.submit(_pixels_or_error, picture, config)
                else:
                    future = Future()
                    future.set_result(_pixels_or_error(picture, config))
                waiting.append((picture, future))
            if not waiting:
                return
            picture, future = waiting.popleft()
            yield picture, future.result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _pixels_or_error(picture: Picture, config: BitGenConfig) -> np.ndarray | ImageError:
    try:
        return picture_pixels(picture, config)
    except ImageError as error:
        return error
