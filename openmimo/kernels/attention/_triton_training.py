"""The Triton kernels of attention of packs of documents, with gradients. Not yet run on a GPU.

A pack is one stream of tokens. Each token knows the first token of its document, so tiles need no alignment to
documents, and a launch depends only on the number of tokens. T tokens, N query heads, G key/value heads, R = N / G,
K key dim (read as two powers of two: 192 = 128 + 64), V value dim (a power of two).

Forward, and gradient of the queries: a program computes some queries with all R heads of one key/value head. Its rows
run over queries first. With R = 2, a window of 4, four queries, blocks of 4 keys and a tail of 4:

    key                    4   5 6 7 8   9 10 11 12
    query 8   head 0, 1        x x x x                keys 5 to 8: a block, which ends with the first query's own key
    query 9   head 0, 1          x x x   x            keys 9 to 12: the tail, the only part with later keys
    query 10  head 0, 1            x x   x x
    query 11  head 0, 1              x   x x  x

So 16 queries with a window of 128 read 144 keys. The tail comes first, because products behind the loop would make
ptxas serialize those in it. Layers without a window read blocks from the first
key of the document on, most of them without a mask.

Gradient of keys and values: a program owns a block of keys and loops over the query heads and over blocks of queries
that see them. Every output has one writer, so there are no atomics, and two runs have the same bits.

The forward pass keeps the output and, in base 2, the logarithm of the sum of the exponentials, sink included. The
gradient of the logits is P (dP - delta), where delta = sum of dO O over the value dims; the gradient of a sink is
-sum of P_sink delta over the tokens. The kernel of the queries' gradient computes delta, which the next one reads.
"""

import triton
import triton.language as tl


@triton.jit
def _rows(source, first, num_rows, stride, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of the rows from `first` on and the columns from `column` on; 0 outside of the rows."""
    row = first + tl.arange(0, ROWS)
    place = row.to(tl.int64)[:, None] * stride + (column + tl.arange(0, COLUMNS))[None, :]
    return tl.load(source + place, mask=((row >= 0) & (row < num_rows))[:, None], other=0.0)


@triton.jit
def _block(source, first, FIRST: tl.constexpr, REST: tl.constexpr, VALUES: tl.constexpr, SIZE: tl.constexpr,
           IS_TMA: tl.constexpr):  # fmt: skip
    """The first dims, the other dims and the values of `SIZE` tokens of a head; 0 outside of the pack.

    `source` has the two tensors, their descriptors, the head, the number of tokens and the two strides.
    """
    k, v, k_first, k_rest, v_all, head, num_tokens, stride_k, stride_v = source
    column, v_column = head * (FIRST + REST), head * VALUES
    if IS_TMA:
        first_dims = k_first.load([first, column])
        rest_dims = first_dims
        if REST > 0:
            rest_dims = k_rest.load([first, column + FIRST])
        values = v_all.load([first, v_column])
    else:
        first_dims = _rows(k, first, num_tokens, stride_k, column, SIZE, FIRST)
        rest_dims = first_dims
        if REST > 0:
            rest_dims = _rows(k, first, num_tokens, stride_k, column + FIRST, SIZE, REST)
        values = _rows(v, first, num_tokens, stride_v, v_column, SIZE, VALUES)
    return first_dims, rest_dims, values


@triton.jit
def _logits(rows, k_first, k_rest, first, scale, SIZE: tl.constexpr, REST: tl.constexpr, MASK: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """Logits in base 2 of the rows with `SIZE` keys from `first` on; -inf for those that a row does not see.

    MASK is 0 if all rows see all keys, 1 if the keys may be too old, 2 if they may also be later than the query.
    """
    q_first, q_rest, query, oldest = rows
    logits = tl.dot(q_first, tl.trans(k_first), input_precision=PRECISION)
    if REST > 0:
        logits = tl.dot(q_rest, tl.trans(k_rest), logits, input_precision=PRECISION)
    logits *= scale
    key = first + tl.arange(0, SIZE)
    if MASK == 1:
        logits = tl.where(key[None, :] >= oldest[:, None], logits, float("-inf"))
    elif MASK == 2:
        is_seen = (key[None, :] >= oldest[:, None]) & (key[None, :] <= query[:, None])
        logits = tl.where(is_seen, logits, float("-inf"))
    return logits


@triton.jit
def _add_keys(state, rows, source, first, scale, FIRST: tl.constexpr, REST: tl.constexpr, VALUES: tl.constexpr,
              SIZE: tl.constexpr, IS_TMA: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The running maximum, sum and weighted values after `SIZE` more keys."""
    largest, total, sum_values = state
    k_first, k_rest, values = _block(source, first, FIRST, REST, VALUES, SIZE, IS_TMA)
    logits = _logits(rows, k_first, k_rest, first, scale, SIZE, REST, MASK, PRECISION)
    new_largest = tl.maximum(largest, tl.max(logits, axis=1))
    probabilities = tl.exp2(logits - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    total = total * shrink + tl.sum(probabilities, axis=1)
    sum_values = tl.dot(probabilities.to(values.dtype), values, sum_values * shrink[:, None], input_precision=PRECISION)
    return new_largest, total, sum_values


@triton.jit
def _tile_rows(order, starts, num_tokens, num_groups, HEADS: tl.constexpr, HEADS_PAD: tl.constexpr,
               ROWS: tl.constexpr, WINDOW: tl.constexpr):  # fmt: skip
    """The rows of a program: their queries, heads and oldest keys, and whether they exist."""
    tile, group = tl.program_id(0) // num_groups, tl.program_id(0) % num_groups
    if WINDOW == 0:
        tile = tl.load(order + tile)
    QUERIES: tl.constexpr = ROWS // HEADS_PAD
    row = tl.arange(0, ROWS)
    first_query = tile * QUERIES
    query, head = first_query + row // HEADS_PAD, group * HEADS + row % HEADS_PAD
    is_row = (query < num_tokens) & (row % HEADS_PAD < HEADS)
    oldest = tl.load(starts + query, mask=query < num_tokens, other=0)
    if WINDOW > 0:
        oldest = tl.maximum(oldest, query - (WINDOW - 1))
    return tile, group, first_query, query, head, is_row, oldest


@triton.jit
def _block_range(starts, first_query, num_tokens, QUERIES: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """The first keys of the first block, of the first block without a mask, and of the tail."""
    tail = first_query + 1
    first_start = tl.load(starts + first_query)
    if WINDOW > 0:
        oldest = tl.maximum(first_start, first_query - (WINDOW - 1))
        start = tail - (tail - oldest + BLOCK - 1) // BLOCK * BLOCK
        whole = tail
    else:
        last_start = tl.load(starts + tl.minimum(first_query + QUERIES, num_tokens) - 1)
        start = tail - (tail - first_start + BLOCK - 1) // BLOCK * BLOCK
        whole = tail - tl.maximum(tail - last_start, 0) // BLOCK * BLOCK
    return start, whole, tail


@triton.jit(do_not_specialize=["num_tokens"])
def forward(
    q, k, v, k_first, k_rest, v_all, sink, order, starts, out, lse, scale,
    num_tokens, num_groups, stride_q, stride_k, stride_v,
    HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    VALUES: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, WINDOW: tl.constexpr, IS_UNROLLED: tl.constexpr,
    PRECISION: tl.constexpr, IS_TMA: tl.constexpr, HAS_SINK: tl.constexpr,
):  # fmt: skip
    """Write output [T, N, V] and log-sum-exp [N, T] of a tile of queries."""
    tile, group, first_query, query, head, is_row, oldest = _tile_rows(
        order, starts, num_tokens, num_groups, HEADS, HEADS_PAD, ROWS, WINDOW
    )
    q_rows = q + query.to(tl.int64)[:, None] * stride_q + head[:, None] * (FIRST + REST)
    q_first = tl.load(q_rows + tl.arange(0, FIRST)[None, :], mask=is_row[:, None], other=0.0)
    q_rest = q_first
    if REST > 0:
        q_rest = tl.load(q_rows + (FIRST + tl.arange(0, REST))[None, :], mask=is_row[:, None], other=0.0)
    largest = tl.full((ROWS,), -1e30, tl.float32)  # finite, so that rows whose keys are all hidden have no NaN
    total = tl.zeros((ROWS,), tl.float32)
    if HAS_SINK:
        sink_rows = tl.load(sink + head, mask=is_row, other=0.0).to(tl.float32) * 1.4426950408889634
        largest = tl.maximum(largest, sink_rows)
        total = tl.exp2(sink_rows - largest)
    sum_values = tl.zeros((ROWS, VALUES), tl.float32)
    source = (k, v, k_first, k_rest, v_all, group, num_tokens, stride_k, stride_v)
    rows = (q_first, q_rest, query, oldest)
    state = (largest, total, sum_values)
    start, whole, tail = _block_range(starts, first_query, num_tokens, ROWS // HEADS_PAD, BLOCK, WINDOW)
    if ROWS > HEADS_PAD:  # the tile has a second query
        state = _add_keys(state, rows, source, tail, scale, FIRST, REST, VALUES, TAIL, False, 2, PRECISION)
    if IS_UNROLLED:
        for i in tl.static_range((WINDOW + BLOCK - 1) // BLOCK):
            first = tail - (i + 1) * BLOCK
            state = _add_keys(state, rows, source, first, scale, FIRST, REST, VALUES, BLOCK, IS_TMA, 1, PRECISION)
    else:
        for first in range(start, whole, BLOCK):
            state = _add_keys(state, rows, source, first, scale, FIRST, REST, VALUES, BLOCK, IS_TMA, 1, PRECISION)
        if WINDOW == 0:
            for first in range(whole, tail, BLOCK):
                state = _add_keys(state, rows, source, first, scale, FIRST, REST, VALUES, BLOCK, IS_TMA, 0, PRECISION)
    largest, total, sum_values = state
    place = (query.to(tl.int64) * (num_groups * HEADS) + head)[:, None] * VALUES + tl.arange(0, VALUES)[None, :]
    result = sum_values / tl.where(is_row, total, 1.0)[:, None]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=is_row[:, None])
    tl.store(lse + head.to(tl.int64) * num_tokens + query, largest + tl.log2(total), mask=is_row)


@triton.jit
def _add_gradients(state, rows, outputs, source, first, scale, FIRST: tl.constexpr, REST: tl.constexpr,
                   VALUES: tl.constexpr, SIZE: tl.constexpr, IS_TMA: tl.constexpr, MASK: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """The gradient of the queries, without the scale, after `SIZE` more keys."""
    grad_first, grad_rest = state
    grad, lse, delta = outputs
    k_first, k_rest, values = _block(source, first, FIRST, REST, VALUES, SIZE, IS_TMA)
    logits = _logits(rows, k_first, k_rest, first, scale, SIZE, REST, MASK, PRECISION)
    probabilities = tl.exp2(logits - lse[:, None])
    grad_probabilities = tl.dot(grad, tl.trans(values), input_precision=PRECISION)
    grad_logits = (probabilities * (grad_probabilities - delta[:, None])).to(k_first.dtype)
    grad_first = tl.dot(grad_logits, k_first, grad_first, input_precision=PRECISION)
    if REST > 0:
        grad_rest = tl.dot(grad_logits, k_rest, grad_rest, input_precision=PRECISION)
    return grad_first, grad_rest


@triton.jit(do_not_specialize=["num_tokens"])
def gradient_of_queries(
    q, k, v, k_first, k_rest, v_all, sink, order, starts, out, grad_out, lse, delta, grad_q, grad_sinks, scale,
    plain_scale, stride_g, num_tokens, num_groups, stride_q, stride_k, stride_v,
    HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    VALUES: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, WINDOW: tl.constexpr, IS_UNROLLED: tl.constexpr,
    PRECISION: tl.constexpr, IS_TMA: tl.constexpr, HAS_SINK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a tile of queries, its delta [N, T] and its part of the sinks' gradients [C, N]."""
    tile, group, first_query, query, head, is_row, oldest = _tile_rows(
        order, starts, num_tokens, num_groups, HEADS, HEADS_PAD, ROWS, WINDOW
    )
    value_dims = tl.arange(0, VALUES)[None, :]
    place = (query.to(tl.int64) * (num_groups * HEADS) + head)[:, None]
    out_rows = tl.load(out + place * VALUES + value_dims, mask=is_row[:, None], other=0.0)
    grad_rows = grad_out + query.to(tl.int64)[:, None] * stride_g + head[:, None] * VALUES
    grad = tl.load(grad_rows + value_dims, mask=is_row[:, None], other=0.0)
    delta_rows = tl.sum(out_rows.to(tl.float32) * grad.to(tl.float32), axis=1)
    number = head.to(tl.int64) * num_tokens + query
    lse_rows = tl.load(lse + number, mask=is_row, other=0.0)
    tl.store(delta + number, delta_rows, mask=is_row)
    if HAS_SINK:
        sink_rows = tl.load(sink + head, mask=is_row, other=float("-inf")).to(tl.float32) * 1.4426950408889634
        sinks = tl.exp2(sink_rows - lse_rows) * -delta_rows
        sinks = tl.sum(tl.reshape(sinks, (ROWS // HEADS_PAD, HEADS_PAD)), axis=0)
        heads = tl.arange(0, HEADS_PAD)
        tl.store(grad_sinks + (tile * num_groups + group) * HEADS + heads, sinks, mask=heads < HEADS)
    q_rows = q + query.to(tl.int64)[:, None] * stride_q + head[:, None] * (FIRST + REST)
    q_first = tl.load(q_rows + tl.arange(0, FIRST)[None, :], mask=is_row[:, None], other=0.0)
    grad_first = tl.zeros((ROWS, FIRST), tl.float32)
    q_rest, grad_rest = q_first, grad_first
    if REST > 0:
        q_rest = tl.load(q_rows + (FIRST + tl.arange(0, REST))[None, :], mask=is_row[:, None], other=0.0)
        grad_rest = tl.zeros((ROWS, REST), tl.float32)
    source = (k, v, k_first, k_rest, v_all, group, num_tokens, stride_k, stride_v)
    rows = (q_first, q_rest, query, oldest)
    outputs = (grad, lse_rows, delta_rows)
    state = (grad_first, grad_rest)
    start, whole, tail = _block_range(starts, first_query, num_tokens, ROWS // HEADS_PAD, BLOCK, WINDOW)
    if ROWS > HEADS_PAD:  # the tile has a second query
        state = _add_gradients(
            state, rows, outputs, source, tail, scale, FIRST, REST, VALUES, TAIL, False, 2, PRECISION
        )
    if IS_UNROLLED:
        for i in tl.static_range((WINDOW + BLOCK - 1) // BLOCK):
            first = tail - (i + 1) * BLOCK
            state = _add_gradients(
                state, rows, outputs, source, first, scale, FIRST, REST, VALUES, BLOCK, IS_TMA, 1, PRECISION
            )
    else:
        for first in range(start, whole, BLOCK):
            state = _add_gradients(
                state, rows, outputs, source, first, scale, FIRST, REST, VALUES, BLOCK, IS_TMA, 1, PRECISION
            )
        if WINDOW == 0:
            for first in range(whole, tail, BLOCK):
                state = _add_gradients(
                    state, rows, outputs, source, first, scale, FIRST, REST, VALUES, BLOCK, IS_TMA, 0, PRECISION
                )
    grad_first, grad_rest = state
    target = grad_q + place * (FIRST + REST)
    kind = grad_q.dtype.element_ty
    tl.store(target + tl.arange(0, FIRST)[None, :], (grad_first * plain_scale).to(kind), mask=is_row[:, None])
    if REST > 0:
        rest = FIRST + tl.arange(0, REST)[None, :]
        tl.store(target + rest, (grad_rest * plain_scale).to(kind), mask=is_row[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def gradient_of_keys(
    q, grad_out, k, v, q_first, q_rest, grad_all, order, starts, stops, lse, delta, grad_k, grad_v, scale, plain_scale,
    num_tokens, num_groups, stride_q, stride_k, stride_v, stride_g,
    HEADS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, VALUES: tl.constexpr, QUERIES: tl.constexpr,
    BLOCK: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, IS_TMA: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a block of keys and values."""
    tile, group = tl.program_id(0) // num_groups, tl.program_id(0) % num_groups
    if WINDOW == 0:
        tile = tl.load(order + tile)
    first_key = tile * BLOCK
    own = (k, v, None, None, None, group, num_tokens, stride_k, stride_v)
    keys_first, keys_rest, values = _block(own, first_key, FIRST, REST, VALUES, BLOCK, False)
    key = first_key + tl.arange(0, BLOCK)
    last_key = tl.minimum(first_key + BLOCK, num_tokens) - 1
    stop = tl.load(stops + last_key)
    if WINDOW > 0:
        stop = tl.minimum(stop, last_key + WINDOW)
    blocks = (stop - first_key + QUERIES - 1) // QUERIES
    sum_first = tl.zeros((BLOCK, FIRST), tl.float32)
    sum_rest = sum_first
    if REST > 0:
        sum_rest = tl.zeros((BLOCK, REST), tl.float32)
    sum_values = tl.zeros((BLOCK, VALUES), tl.float32)
    for i in range(0, HEADS * blocks):
        head, first = group * HEADS + i // blocks, first_key + i % blocks * QUERIES
        query = first + tl.arange(0, QUERIES)
        source = (q, grad_out, q_first, q_rest, grad_all, head, num_tokens, stride_q, stride_g)
        queries_first, queries_rest, grad = _block(source, first, FIRST, REST, VALUES, QUERIES, IS_TMA)
        is_query = query < num_tokens
        number = head.to(tl.int64) * num_tokens + query
        lse_columns = tl.load(lse + number, mask=is_query, other=0.0)
        delta_columns = tl.load(delta + number, mask=is_query, other=0.0)
        oldest = tl.load(starts + query, mask=is_query, other=num_tokens)
        if WINDOW > 0:
            oldest = tl.maximum(oldest, query - (WINDOW - 1))
        logits = tl.dot(keys_first, tl.trans(queries_first), input_precision=PRECISION)
        if REST > 0:
            logits = tl.dot(keys_rest, tl.trans(queries_rest), logits, input_precision=PRECISION)
        is_seen = (key[:, None] >= oldest[None, :]) & (key[:, None] <= query[None, :])
        probabilities = tl.where(is_seen, tl.exp2(logits * scale - lse_columns[None, :]), 0.0)
        sum_values = tl.dot(probabilities.to(grad.dtype), grad, sum_values, input_precision=PRECISION)
        grad_probabilities = tl.dot(values, tl.trans(grad), input_precision=PRECISION)
        grad_logits = (probabilities * (grad_probabilities - delta_columns[None, :])).to(queries_first.dtype)
        sum_first = tl.dot(grad_logits, queries_first, sum_first, input_precision=PRECISION)
        if REST > 0:
            sum_rest = tl.dot(grad_logits, queries_rest, sum_rest, input_precision=PRECISION)
    is_key = (key < num_tokens)[:, None]
    place = (key.to(tl.int64) * num_groups + group)[:, None]
    target = grad_k + place * (FIRST + REST)
    kind = grad_k.dtype.element_ty
    tl.store(target + tl.arange(0, FIRST)[None, :], (sum_first * plain_scale).to(kind), mask=is_key)
    if REST > 0:
        rest = FIRST + tl.arange(0, REST)[None, :]
        tl.store(target + rest, (sum_rest * plain_scale).to(kind), mask=is_key)
    value_dims = tl.arange(0, VALUES)[None, :]
    tl.store(grad_v + place * VALUES + value_dims, sum_values.to(kind), mask=is_key)
