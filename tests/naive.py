"""The decoder once more, in float64 NumPy: one sequence, one head and one query at a time.

It shares no code with the package; of the config it reads what the decoder is told by it, and of
the parameters the names. Slow, and meant to be read.
"""

import functools
import math

import numpy as np


def relu(x):
    return np.maximum(x, 0)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_exact(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def swish(x):
    return x / (1 + np.exp(-x))


ACTIVATIONS = {
    "relu": relu,
    "gelu": gelu,
    "gelu_exact": gelu_exact,
    "swish": swish,
    "relu2": lambda x: relu(x) ** 2,
}
GATES = {"swiglu": swish, "geglu": gelu, "reglu": relu}


def in_dilated_window(c, query, key):
    return any(key == query - i * c.attention_dilation for i in range(c.attention_window))


def closes_its_block(c, key):
    return key % c.attention_block >= c.attention_block - c.attention_globals


# Which keys up to the query's own it sees.
VISIBLE = {
    "full": lambda c, query, key: True,
    "sliding_window": lambda c, query, key: query - c.attention_window < key,
    "longformer": lambda c, query, key: (
        key < c.attention_globals or in_dilated_window(c, query, key)
    ),
    "fixed_sparse": lambda c, query, key: (
        key // c.attention_block == query // c.attention_block or closes_its_block(c, key)
    ),
    "strided_sparse": lambda c, query, key: (
        query - key < c.attention_block or (query - key) % c.attention_block == 0
    ),
}
POSITIONS = {"none", "learned", "sinusoidal", "rope", "alibi", "t5"}


def defines(config):
    """Whether this file knows all of a config's components."""
    return (
        config.layout in LAYOUTS
        and config.position in POSITIONS
        and config.activation in {*ACTIVATIONS, *GATES}
        and set(config.attention_pattern) <= {*VISIBLE, "linformer", "linear"}
    )


def decode(config, params, tokens, window=None):
    """Logits (time, vocab) of one sequence; `window` bounds how far back any layer sees."""
    c, params, x = begin(config, params, tokens)
    features = LAYOUTS[c.layout](c, params, x, window)
    return projected(c, params, copied(c, params, features, tokens, window))


def decode_stopping(config, params, tokens, at_once=0, window=None):
    """Logits, and the blocks each token passed: it stops at the first exit that is confident.

    The first `at_once` tokens pass all blocks. Where a token has stopped, the blocks above have its
    residual stream of then for an input.
    """
    c, params, embedded = begin(config, params, tokens)
    inputs = [[] for _ in range(c.n_layers)]
    logits, depths = [], []
    for t, x in enumerate(embedded):
        depth = None
        for layer in range(c.n_layers):
            inputs[layer].append(x)
            if depth is not None:
                continue
            x = one_layer(c, params, layer, np.stack(inputs[layer]), window)[0][-1]
            passed = layer + 1
            may_stop = passed >= c.exit_minimum and (passed - c.exit_minimum) % c.exit_every == 0
            sure = confidence(c, head(c, params, x)) > c.exit_threshold
            if passed == c.n_layers or (may_stop and sure and t >= at_once):
                depth = passed
        logits.append(head(c, params, x))
        depths.append(depth)
    return np.stack(logits), depths


def confidence(c, logits):
    """The largest probability, or how far it is above the second."""
    weights = np.sort(np.exp(logits - logits.max()))[::-1] / np.exp(logits - logits.max()).sum()
    return weights[0] if c.exit_confidence == "probability" else weights[0] - weights[1]


def training_losses(config, params, tokens, targets):
    """What training minimises at each token of one sequence."""
    c, params, x = begin(config, params, tokens)
    loss, weights, router_loss, routers = 0.0, 0.0, 0.0, 0

    def losses(x):
        features = norm(c, params["body"].get("final_norm"), x)
        logits = projected(c, params, copied(c, params, features, tokens, None))
        return cross_entropy(logits, targets)

    for layer in range(c.n_layers):
        x, score = one_layer(c, params, layer, x, None, training=True)
        depth = layer + 1
        is_exit = (
            depth >= c.exit_minimum and (depth - c.exit_minimum) % c.exit_every == 0
            if c.depth == "early_exit"
            else False
        )
        if is_exit or depth == c.n_layers:
            weight = depth**c.exit_loss_power
            loss = loss + weight * losses(x)
            weights += weight
        if score is not None:
            taken = highest(score, c.mod_capacity)
            router_loss = router_loss - np.log(sigmoid(np.where(taken, score, -score)))
            routers += 1
    return loss / weights + c.mod_loss_weight * router_loss / max(1, routers)


def cross_entropy(logits, targets):
    return np.array(
        [
            np.log(np.exp(row).sum()) - row[target]
            for row, target in zip(logits, targets, strict=True)
        ]
    )


def begin(config, params, tokens):
    """The config in full, the parameters in float64, and what the first block sees."""
    c = config.resolve()
    params = to_float64(params)
    x = [params["embedding"][token] for token in tokens]
    return c, params, np.stack([row + added_position(c, params, t) for t, row in enumerate(x)])


def head(c, params, x):
    """Logits of the residual stream, of one token or of many."""
    return projected(c, params, norm(c, params["body"].get("final_norm"), x))


def projected(c, params, x):
    """Logits of what the head sees."""
    logits = x @ params["embedding"].T if c.tie_embeddings else linear(params["head"], x)
    if c.logit_softcap is not None:
        logits = np.tanh(logits / c.logit_softcap) * c.logit_softcap
    return logits


def copied(c, params, features, tokens, window):
    """To each token's features, as much as its gate says of the embeddings that it points at."""
    if not c.copying:
        return features
    p, out = params["copying"], features.copy()
    values = [root_mean_square(c, params["embedding"][token]) for token in tokens]
    queries, keys, gates = (linear(p[name], features) for name in ("query", "key", "gate"))
    for at, query in enumerate(queries):
        first = 0 if window is None else max(0, at + 1 - window)
        weights = np.exp([query @ key / math.sqrt(c.d_model) for key in keys[first : at + 1]])
        for weight, value in zip(weights / weights.sum(), values[first : at + 1], strict=True):
            out[at] += gates[at] * weight * value
    return out


def convolved(c, p, x):
    """To each token's features, a weighted sum of its own and those of the few before it."""
    if p is None:
        return x
    out = x.copy()
    for at in range(len(x)):
        for back in range(min(c.convolution_width, at + 1)):
            out[at] += p["taps"][:, back] * x[at - back]
    return out


def serial(c, params, x, window):
    """Blocks one after another, and a norm."""
    for layer in range(c.n_layers):
        x, _ = one_layer(c, params, layer, x, window)
    return norm(c, params["body"].get("final_norm"), x)


def parallel_stacks(c, params, x, window):
    """Stacks one after another, each a row of slices."""
    p, pattern = params["body"], c.attention_pattern
    for i in range(c.n_stacks):
        x = norm(c, p.get(f"norm_{i}"), x)
        stack, slices = p[f"stack_{i}"], []
        for layer in range(c.layers_per_stack):
            period, place = divmod(layer, len(pattern))
            part = slice_of(stack["blocks"][f"block_{place}"], period)
            slices.append(one_slice(c, part, pattern[place], x, window))
        x = np.concatenate(slices, axis=-1)
        assert x.shape[-1] == c.d_model * (4 if i == c.n_stacks - 1 else 1)
        if c.feed_forward:
            x = feed_forward(c, stack["feed_forward"], x)
        x = norm(c, stack.get("norm"), x)
    return x


LAYOUTS = {"serial": serial, "parallel_stacks": parallel_stacks}


def one_slice(c, p, mechanism, x, window):
    """What one layer of a stack adds to the features."""
    out = attention(c, p["attention"], mechanism, first_norm(c, p, x), window, range(len(x)))
    if c.norm_placement == "sandwich":
        out = norm(c, p.get("attention_out_norm"), out)
    h = x + out if c.residual in (True, "attention") else out
    if c.norm_placement == "post":
        h = norm(c, p.get("attention_norm"), h)
    if not c.feed_forward:
        return linear(p["skip"], h)
    fed = linear(p["narrow"], feed_forward(c, p["feed_forward"], h))
    return linear(p["skip"], h) + fed if c.residual in (True, "feed_forward") else fed


def first_norm(c, p, x):
    """The norm before attention, where the placement has one."""
    if c.norm_placement in ("pre", "sandwich"):
        return norm(c, p.get("attention_norm"), x)
    return norm(c, p.get("norm"), x) if c.norm_placement == "parallel" else x


def one_layer(c, params, layer, x, window, training=False):
    """The block of this number, and its router's scores where it has a router."""
    every = c.mod_every if c.depth == "mixture_of_depths" else 1
    period, place = divmod(layer, math.lcm(len(c.attention_pattern), every))
    p = slice_of(params["body"]["blocks"][f"block_{place}"], period)
    mechanism = c.attention_pattern[layer % len(c.attention_pattern)]
    if c.depth != "mixture_of_depths" or (layer + 1) % every:
        return one_block(c, p, mechanism, x, window, range(len(x))), None
    score = linear(p["router"], x)[:, 0]
    places = np.flatnonzero(highest(score, c.mod_capacity) if training else score > 0)
    new = x.copy()
    if len(places):
        out = one_block(c, p["block"], mechanism, x[places], window, places)
        new[places] += sigmoid(score[places])[:, None] * (out - x[places])
    return new, score


def highest(score, share):
    """Where the highest scores are."""
    count = max(1, round(share * len(score)))
    return score >= np.sort(score)[-count]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def one_block(c, p, mechanism, x, window, places):
    """Attention and feed-forward, wired by the norms' placement, of tokens at these places."""

    def attend(h):
        h = convolved(c, p.get("attention_convolution"), h)
        return attention(c, p["attention"], mechanism, h, window, places)

    def feed(h):
        h = convolved(c, p.get("feed_forward_convolution"), h)
        return feed_forward(c, p["feed_forward"], h)

    def n(name, h):
        return norm(c, p.get(name), h)

    def add(branch, x, y):
        return x + y if c.residual in (True, branch) else y

    if c.norm_placement == "pre":
        x = add("attention", x, attend(n("attention_norm", x)))
        if c.feed_forward:
            x = add("feed_forward", x, feed(n("feed_forward_norm", x)))
    elif c.norm_placement == "post":
        x = n("attention_norm", add("attention", x, attend(x)))
        if c.feed_forward:
            x = n("feed_forward_norm", add("feed_forward", x, feed(x)))
    elif c.norm_placement == "sandwich":
        x = add("attention", x, n("attention_out_norm", attend(n("attention_norm", x))))
        if c.feed_forward:
            x = add("feed_forward", x, n("feed_forward_out_norm", feed(n("feed_forward_norm", x))))
    elif c.norm_placement == "parallel":
        h = n("norm", x)
        x = add("attention", x, attend(h) + feed(h) if c.feed_forward else attend(h))
    elif c.norm_placement == "none":
        x = add("attention", x, attend(x))
        if c.feed_forward:
            x = add("feed_forward", x, feed(x))
    return x


def attention(c, p, mechanism, x, window, places):
    """Each head and each query by itself."""
    time, d = len(x), c.d_head
    q, k, v = (linear(p[name], x) for name in ("query", "key", "value"))
    out = np.zeros((time, c.n_heads * d))
    for head in range(c.n_heads):
        shared = head // (c.n_heads // c.n_kv_heads)
        queries = q[:, head * d : (head + 1) * d]
        keys = k[:, shared * d : (shared + 1) * d]
        values = v[:, shared * d : (shared + 1) * d]
        if c.qk_norm:
            queries = root_mean_square(c, queries) * p["query_norm"]["scale"]
            keys = root_mean_square(c, keys) * p["key_norm"]["scale"]
        if mechanism == "linear":
            mixed = linear_attention(c, queries, keys, values, places)
        else:
            turned_queries, turned_keys = turned(c, queries, places), turned(c, keys, places)
            if mechanism == "linformer":
                assert list(places) == list(range(time))
                seen = functools.partial(block_sums_and_own_block, c, p["mixing"])
            else:
                seen = functools.partial(masked_keys, c, mechanism, window, places)
            mixed = [
                softmax_attention(c, p, head, query, places[i], seen(i, turned_keys, values))
                for i, query in enumerate(turned_queries)
            ]
        out[:, head * d : (head + 1) * d] = mixed
    return linear(p["out"], out) if c.attention_projection else out


def softmax_attention(c, p, head, query, at, seen):
    """The mean of the values of (place, key, value) triples, weighted by a softmax of scores."""
    scores = np.array([query @ key / math.sqrt(c.d_head) for _, key, _ in seen])
    scores += [position_bias(c, p, head, at - place) for place, _, _ in seen]
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    return sum(weight * value for weight, (_, _, value) in zip(weights, seen, strict=True))


def masked_keys(c, mechanism, window, places, query, keys, values):
    """What this query sees of the keys before it and of its own."""
    at = places[query]
    return [
        (place, keys[key], values[key])
        for key, place in enumerate(places[: query + 1])
        if VISIBLE[mechanism](c, at, place) and (window is None or at - place < window)
    ]


def block_sums_and_own_block(c, p, at, keys, values):
    """Linformer: sums of earlier blocks, as many blocks in all as a context has."""
    size, seen = c.attention_block, []
    own = at // size
    for block in range(max(0, own + 1 - c.context_length // size), own):
        inside = range(block * size, (block + 1) * size)
        for slot in range(c.attention_rank):
            key = sum(p["keys"][slot, place % size] * keys[place] for place in inside)
            value = sum(p["values"][slot, place % size] * values[place] for place in inside)
            seen.append((inside[-1], key, value))
    return seen + [(place, keys[place], values[place]) for place in range(own * size, at + 1)]


def linear_attention(c, queries, keys, values, places):
    """Weights are products of features, over sums of unturned ones; nothing is forgotten."""
    queries, keys = features(queries), features(keys)
    turned_queries, turned_keys = turned(c, queries, places), turned(c, keys, places)
    return [
        sum(turned_queries[at] @ turned_keys[key] * values[key] for key in range(at + 1))
        / sum(queries[at] @ keys[key] for key in range(at + 1))
        for at in range(len(queries))
    ]


def features(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def turned(c, rows, places):
    """Each row turned by its place, where positions are rotary."""
    if c.position != "rope":
        return rows
    return np.stack([turned_by(c, row, t) for row, t in zip(rows, places, strict=True)])


def turned_by(c, row, t):
    """Each pair (i, i + half) as a complex number, turned by its own frequency."""
    width = round(c.rope_fraction * len(row))
    half = width // 2
    pairs = row[:half] + 1j * row[half:width]
    place = t / c.rope_scaling
    pairs = pairs * np.exp(1j * place * c.rope_base ** (-2 * np.arange(half) / width))
    return np.concatenate([pairs.real, pairs.imag, row[width:]])


def position_bias(c, p, head, distance):
    """What is added to the score of a query and a key so far before it."""
    if c.position == "alibi":
        return -alibi_slopes(c.n_heads)[head] * distance
    if c.position == "t5":
        return p["positions"]["bias"][head, t5_bucket(c, distance)]
    return 0.0


def alibi_slopes(n):
    """A geometric series; where n is no power of two, the rest is every other of a longer one."""
    below = 2 ** int(math.log2(n))
    if n == below:
        return [2 ** (-8 * (i + 1) / n) for i in range(n)]
    return alibi_slopes(below) + alibi_slopes(2 * below)[::2][: n - below]


def t5_bucket(c, distance):
    """Half of the buckets hold a distance each, the others grow by a constant factor."""
    single = c.position_buckets // 2
    if distance < single:
        return distance
    growth = math.log(distance / single) / math.log(c.position_max_distance / single)
    # The tolerance stands for rounding where the ratio of the logarithms is a whole number.
    bucket = single + int(growth * (c.position_buckets - single) + 1e-9)
    return min(bucket, c.position_buckets - 1)


def added_position(c, params, t):
    """What position t adds to a token's embedding."""
    if c.position == "learned":
        return params["positions"]["embedding"][t]
    if c.position == "sinusoidal":
        waves = []
        for i in range(c.d_model):
            angle = t / c.rope_base ** (i // 2 * 2 / c.d_model)
            waves.append(math.cos(angle) if i % 2 else math.sin(angle))
        return np.array(waves)
    return 0.0


def feed_forward(c, p, x):
    """down(f(up(x))), or down(f(gate(x)) * up(x)); without a projection there is no down."""
    if c.activation in GATES:
        hidden = GATES[c.activation](linear(p["gate"], x)) * linear(p["up"], x)
    else:
        hidden = ACTIVATIONS[c.activation](linear(p["up"], x))
    return linear(p["down"], hidden) if c.feed_forward_projection else hidden


def norm(c, p, x):
    """The config's norm, over the width."""
    if c.norm == "none":
        return x
    if c.norm == "rmsnorm":
        return root_mean_square(c, x) * p["scale"]
    centred = x - x.mean(axis=-1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + c.norm_epsilon) * p["scale"]
    return y + p["bias"] if c.bias else y


def root_mean_square(c, x):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + c.norm_epsilon)


def linear(p, x):
    y = x @ p["kernel"]
    return y + p["bias"] if "bias" in p else y


def to_float64(tree):
    if isinstance(tree, dict):
        return {name: to_float64(branch) for name, branch in tree.items()}
    return np.asarray(tree, np.float64)


def slice_of(tree, index):
    if isinstance(tree, dict):
        return {name: slice_of(branch, index) for name, branch in tree.items()}
    return tree[index]
