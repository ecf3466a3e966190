"""Triton programs between images and patches: :func:`compose` makes images, :func:`collect` makes patches.

:mod:`ssdir.model.kernels.gpu` says how they are launched, and why so. Whose image, whose patch and which row of
``covered`` is counted in 64 bits: those offsets may pass 2^31. Names in capitals are constants of a compilation.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from ssdir.model.kernels.gpu_axis import (
    averaged,
    crop_weight,
    in_patch,
    load_box,
    paste_weight,
    readers,
    support,
    touched,
    within,
)


@triton.jit(do_not_specialize=["m"])  # it changes from step to step
@no_type_check
def sort_by_image(order, starts, placed, image_index, boxes, m, BLOCK: tl.constexpr):
    """order[starts[i]:starts[i + 1]] are the objects of image i, rising, and ``placed`` their boxes.

    One program an image, which counts the objects before its own, and one for the end.
    """
    image = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    place = image * 0
    for first in range(0, m, BLOCK):
        index = tl.load(image_index + first + lane, mask=first + lane < m, other=2**62)
        place += tl.sum((index < image).to(tl.int32))
    tl.store(starts + image, place)
    for first in range(0, m, BLOCK):
        mine = tl.load(image_index + first + lane, mask=first + lane < m, other=-1) == image
        rank = place + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(order + rank, first + lane, mask=mine)
        for part in tl.static_range(4):
            tl.store(
                placed + 4 * rank + part, tl.load(boxes + 4 * (first + lane) + part, mask=mine), mask=mine
            )
        place += tl.sum(mine.to(tl.int32))


# Images out of patches: paste, and the gradient of crop to its images.


@triton.jit
@no_type_check
def _pasted(patch, channel, C, y, x, box, p, height, width):
    """The pasted patch at rows y and columns x: (channels, rows, columns), four taps a pixel."""
    cx, cy, w, h, _ = box
    v = within(in_patch(y.to(cx.dtype), cy, h, p, height), -2, p + 1)
    u = within(in_patch(x.to(cx.dtype), cx, w, p, width), -2, p + 1)
    above, left = tl.floor(v), tl.floor(u)
    pasted = tl.zeros([channel.shape[0], y.shape[0], x.shape[0]], dtype=cx.dtype)
    for down in tl.static_range(2):
        i = above.to(tl.int32) + down
        weight_y = 1 - tl.abs(v - (above + down))
        row = channel[:, None] * (p * p) + i[None, :] * p
        row_there = (channel < C)[:, None] & ((i >= 0) & (i < p))[None, :]
        for along in tl.static_range(2):
            j = left.to(tl.int32) + along
            weight_x = 1 - tl.abs(u - (left + along))
            there = row_there[:, :, None] & ((j >= 0) & (j < p))[None, None, :]
            tap = tl.load(patch + (row[:, :, None] + j[None, None, :]), mask=there, other=0.0)
            pasted += tap * (weight_y[:, None] * weight_x[None, :])[None, :, :]
    return pasted


@triton.jit
@no_type_check
def _returned(grad, channel, C, y, x, box, p, height, width, AVERAGE: tl.constexpr, BORDER: tl.constexpr):
    """What a crop's gradient gives back to rows y and columns x: (channels, rows, columns)."""
    cx, cy, w, h, _ = box
    average_y, average_x = averaged(h, p, height, AVERAGE), averaged(w, p, width, AVERAGE)
    fy, fx = y.to(cx.dtype), x.to(cx.dtype)
    top, rows = readers(fy, cy, h, p, height, BORDER)
    left, columns = readers(fx, cx, w, p, width, BORDER)
    rows, columns = tl.where(y < height, rows, 0), tl.where(x < width, columns, 0)
    returned = tl.zeros([channel.shape[0], y.shape[0], x.shape[0]], dtype=cx.dtype)
    most = tl.max(columns)
    for k in range(tl.max(rows) * most):
        i, j = top + k // most, left + k % most
        weight_y = crop_weight(i.to(cx.dtype), fy, cy, h, p, height, average_y, BORDER)
        weight_x = crop_weight(j.to(cx.dtype), fx, cx, w, p, width, average_x, BORDER)
        there = (k // most < rows)[:, None] & (k % most < columns)[None, :]
        place = channel[:, None, None] * (p * p) + (i[:, None] * p + j[None, :])[None, :, :]
        tap = tl.load(grad + place, mask=(channel < C)[:, None, None] & there[None, :, :], other=0.0)
        returned += tap * (weight_y[:, None] * weight_x[None, :])[None, :, :]
    return returned


@triton.jit
@no_type_check
def _touches(
    placed, slot, top, bottom, left, right, p, height, width, CROP: tl.constexpr, BORDER: tl.constexpr
):
    """Which of the placed boxes at the slots (a vector) touch a tile; its bottom and right are outside."""
    cx, cy, w, h, alive = load_box(placed, slot)
    first_row, last_row = touched(cy, h, p, height, CROP, BORDER)
    first_column, last_column = touched(cx, w, p, width, CROP, BORDER)
    rows = (first_row <= last_row) & (first_row < bottom) & (last_row >= top)
    columns = (first_column <= last_column) & (first_column < right) & (last_column >= left)
    return alive & rows & columns


@triton.jit
@no_type_check
def compose(
    images,
    patches,
    weights,
    order,
    starts,
    placed,
    C,
    p,
    height,
    width,
    CROP: tl.constexpr,
    BORDER: tl.constexpr,
    AVERAGE: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One tile of one image (and CHANNELS of its channels): the sum over the objects that touch it.

    ``patches`` are pasted, or with CROP they are a crop's gradient, given back to the images. The image's boxes are
    looked at CHUNK at a time, side by side; then those that touch the tile are drawn, one after another.
    """
    blocks, tiles_x = tl.cdiv(C, CHANNELS), tl.cdiv(width, TILE_X)
    tiles = tl.cdiv(height, TILE_Y) * tiles_x
    image, tile = tl.program_id(0) // blocks // tiles, tl.program_id(0) // blocks % tiles
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    top, left = tile // tiles_x * TILE_Y, tile % tiles_x * TILE_X
    y, x = top + tl.arange(0, TILE_Y), left + tl.arange(0, TILE_X)

    lane = tl.arange(0, CHUNK)
    total = tl.zeros([CHANNELS, TILE_Y, TILE_X], dtype=images.dtype.element_ty)
    end = tl.load(starts + image + 1)
    for first in range(tl.load(starts + image), end, CHUNK):
        slot = tl.minimum(first + lane, end - 1)
        hits = _touches(placed, slot, top, top + TILE_Y, left, left + TILE_X, p, height, width, CROP, BORDER)
        hits &= first + lane < end
        hit = tl.min(tl.where(hits, lane, CHUNK))
        while hit < CHUNK:
            m = tl.load(order + first + hit).to(tl.int64)
            patch, box = patches + m * C * p * p, load_box(placed, first + hit)
            if CROP:
                drawn = _returned(patch, channel, C, y, x, box, p, height, width, AVERAGE, BORDER)
            else:
                drawn = _pasted(patch, channel, C, y, x, box, p, height, width)
            if weights is not None:
                drawn *= tl.load(weights + m)
            total += drawn
            hit = tl.min(tl.where(hits & (lane > hit), lane, CHUNK))

    row = (image.to(tl.int64) * C + channel)[:, None] * height + y[None, :]
    inside = (channel < C)[:, None, None] & ((y < height)[:, None] & (x < width)[None, :])[None, :, :]
    tl.store(images + row[:, :, None] * width + x[None, None, :], total, mask=inside)


# Patches out of images: crop, and the gradients of paste and covered to their patches.


@triton.jit
@no_type_check
def load_window(windows, m):
    """First covered row, rows, first covered column, columns of object m."""
    return (
        tl.load(windows + 4 * m),
        tl.load(windows + 4 * m + 1),
        tl.load(windows + 4 * m + 2),
        tl.load(windows + 4 * m + 3),
    )


@triton.jit
@no_type_check
def _source(values, image_index, windows, offsets, m, C, height, width):
    """Where object m reads: its image, or its own rows of ``covered`` where there are windows.

    Returns a pointer, the strides of rows, columns and channels from there, and what exists: first row, end of rows,
    first column, end of columns."""
    if windows is None:
        begin = values + tl.load(image_index + m) * C * height * width
        strides = width, 1, height * width
        exists = 0, height, 0, width
    else:
        top, rows, left, columns = load_window(windows, m)
        begin = values + (tl.load(offsets + m) - top.to(tl.int64) * columns - left) * C
        strides = columns.to(tl.int64) * C, C, 1
        exists = top, top + rows, left, left + columns
    return begin, strides, exists


@triton.jit
@no_type_check
def supports(
    k, box, p, height, width, exists, CROP: tl.constexpr, BORDER: tl.constexpr, AVERAGE: tl.constexpr
):
    """The source pixels of the patch pixels k (a vector): first row, rows, first column, columns."""
    cx, cy, w, h, alive = box
    top, bottom, left, right = exists
    i, j = (k // p).to(cx.dtype), (k % p).to(cx.dtype)
    average_y, average_x = averaged(h, p, height, AVERAGE), averaged(w, p, width, AVERAGE)
    first_y, rows = support(i, cy, h, p, height, average_y, top, bottom, CROP, BORDER)
    first_x, columns = support(j, cx, w, p, width, average_x, left, right, CROP, BORDER)
    rows *= alive.to(tl.int32)  # not a mask: the interpreter cannot spread a single truth value over a vector
    return first_y, tl.where(k < p * p, rows, 0), first_x, tl.where(k < p * p, columns, 0)


@triton.jit
@no_type_check
def _tap_weight(
    k, y, x, box, p, height, width, CROP: tl.constexpr, BORDER: tl.constexpr, AVERAGE: tl.constexpr
):
    """How much patch pixel k has of source pixel (y, x)."""
    cx, cy, w, h, _ = box
    i, j = (k // p).to(cx.dtype), (k % p).to(cx.dtype)
    fy, fx = y.to(cx.dtype), x.to(cx.dtype)
    if CROP:
        weight = crop_weight(i, fy, cy, h, p, height, averaged(h, p, height, AVERAGE), BORDER)
        weight *= crop_weight(j, fx, cx, w, p, width, averaged(w, p, width, AVERAGE), BORDER)
    else:
        weight = paste_weight(i, fy, cy, h, p, height) * paste_weight(j, fx, cx, w, p, width)
    return weight


@triton.jit
@no_type_check
def _gather(
    source,
    box,
    channel,
    C,
    k,
    p,
    height,
    width,
    CROP: tl.constexpr,
    BORDER: tl.constexpr,
    AVERAGE: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """The patch pixels k (a vector), each summed over its source pixels, TOGETHER of them at a time: (channels, k)."""
    values, strides, exists = source
    first_y, rows, first_x, columns = supports(k, box, p, height, width, exists, CROP, BORDER, AVERAGE)
    sums = tl.zeros([channel.shape[0], k.shape[0], TOGETHER], dtype=box[0].dtype)
    most = tl.max(columns)
    for first in range(0, tl.max(rows) * most, TOGETHER):
        tap = first + tl.arange(0, TOGETHER)
        down, along = (tap // most)[None, :], (tap % most)[None, :]
        y, x = first_y[:, None] + down, first_x[:, None] + along
        there = (channel < C)[:, None, None] & ((down < rows[:, None]) & (along < columns[:, None]))[
            None, :, :
        ]
        plane = values + channel[:, None, None].to(tl.int64) * strides[2]
        value = tl.load(plane + (y * strides[0] + x * strides[1])[None, :, :], mask=there, other=0.0)
        weight = _tap_weight(k[:, None], y, x, box, p, height, width, CROP, BORDER, AVERAGE)
        sums += value * weight[None, :, :]
    return tl.sum(sums, 2)


@triton.jit
@no_type_check
def _keep(patches, products, product, originals, sums, weight, m, channel, C, k, p):
    """Writes the patch pixels; returns ``product`` plus their product with the originals, where that is asked for."""
    place = (m * C + channel)[:, None] * (p * p) + k[None, :]
    inside = (channel < C)[:, None] & (k < p * p)[None, :]
    if patches is not None:
        tl.store(patches + place, sums * weight, mask=inside)
    if products is not None:
        product += tl.sum(sums * tl.load(originals + place, mask=inside, other=0.0))
    return product


@triton.jit
@no_type_check
def collect(
    patches,
    products,
    values,
    originals,
    boxes,
    image_index,
    weights,
    windows,
    offsets,
    C,
    p,
    height,
    width,
    CROP: tl.constexpr,
    BORDER: tl.constexpr,
    AVERAGE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,
    PART: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """BLOCK pixels of one object's patch (and CHANNELS of its channels), each from its source pixels.

    Up to FEW source pixels, a thread walks over those of its patch pixel; above, PART patch pixels are taken at a time
    and neighbouring threads share the source pixels, TOGETHER at a time.

    ``products``: beside or instead of the patches, the sum over these pixels of original * (collected, without the
    weight). A paste is linear in its patches, so over all blocks that is the gradient of the object's weight.
    """
    blocks, tiles = tl.cdiv(C, CHANNELS), tl.cdiv(p * p, BLOCK)
    m = (tl.program_id(0) // blocks // tiles).to(tl.int64)
    begin = tl.program_id(0) // blocks % tiles * BLOCK
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    box = load_box(boxes, m)
    source = _source(values, image_index, windows, offsets, m, C, height, width)
    weight = box[0] * 0 + 1
    if weights is not None:
        weight = tl.load(weights + m)

    k = begin + tl.arange(0, BLOCK)
    _, rows, _, columns = supports(k, box, p, height, width, source[2], CROP, BORDER, AVERAGE)
    product = box[0] * 0
    if tl.max(rows) * tl.max(columns) <= FEW:
        sums = _gather(source, box, channel, C, k, p, height, width, CROP, BORDER, AVERAGE, 1)
        product = _keep(patches, products, product, originals, sums, weight, m, channel, C, k, p)
    else:
        for first in range(begin, tl.minimum(begin + BLOCK, p * p), PART):
            few = first + tl.arange(0, PART)
            part = _gather(source, box, channel, C, few, p, height, width, CROP, BORDER, AVERAGE, TOGETHER)
            product = _keep(patches, products, product, originals, part, weight, m, channel, C, few, p)
    if products is not None:
        tl.store(products + tl.program_id(0), product)
