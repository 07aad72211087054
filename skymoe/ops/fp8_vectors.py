"""Two vector loops for `ops/fp8_decode.py`, in LLVM IR: numba (extra `cpu`) compiles them, no compiler is needed.

`decode_pairs`: 16 rows of e4m3 codes times scales, rounded to bf16, as VDPBF16PS wants them: for each pair of columns
16 x 2 numbers, row beside row. That is a 16 x 16 transposition of pairs in registers.

`add_pairs`: the sums of 16 outputs of 4 rows, one VDPBF16PS per pair of columns and row: sum += w_odd x_odd, then
sum += w_even x_even, rounded after each. It is the instruction and the order of oneDNN, hence the same bits.

Addresses are plain integers. They are not checked.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
ROWS = 4
COLUMNS = 2 * LANES  # that `decode_pairs` takes at a time

_WORD, _INT, _HALF, _FLOAT = ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()
_WORDS, _INTS, _HALVES, _FLOATS = (ir.VectorType(kind, LANES) for kind in (_WORD, _INT, _HALF, _FLOAT))


class _BFloat(ir.Type):
    """A type that llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_PAIRS = ir.VectorType(_BFloat(), COLUMNS)


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _splat(builder: Any, value: Any, kind: Any) -> Any:
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), ir.Constant(_INTS, [0] * LANES))


def _all(kind: Any, value: float) -> Any:
    return ir.Constant(kind, [value] * LANES)


def _declared(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def _scaled(builder: Any, code: Any, scale: Any) -> Any:
    """16 codes, each in the upper byte of a word: their values times the scale, fp32.

    Moved right by one, sign and all, a code is the fp16 number 2^-8 times as large; the scale has the 256.
    """
    moved = builder.and_(builder.ashr(code, _all(_WORDS, 1)), _all(_WORDS, 0xBF80))
    return builder.fmul(builder.fpext(builder.bitcast(moved, _HALVES), _FLOATS), scale)


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """16 vectors of 16 ints turned round: in four rounds, off-diagonal halves change places."""
    for distance in (8, 4, 2, 1):
        low = [j if not j & distance else LANES + j - distance for j in range(LANES)]
        high = [j + distance if not j & distance else LANES + j for j in range(LANES)]
        for i in range(LANES):
            if not i & distance:
                a, b = rows[i], rows[i + distance]
                rows[i] = builder.shuffle_vector(a, b, ir.Constant(_INTS, low))
                rows[i + distance] = builder.shuffle_vector(a, b, ir.Constant(_INTS, high))
    return rows


def _decode_pairs(typingctx: Any, codes: Any, stride: Any, scales: Any, out: Any, count: Any) -> Any:
    """`count` times 32 columns of 16 rows at `codes`, `stride` bytes apart, times 16 fp32 `scales` / 256, to `out`."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes_, stride_, scales_, out_, count_ = arguments
        scale_at = _pointer(builder, scales_, _FLOAT)
        factors = [
            _splat(builder, builder.load(builder.gep(scale_at, [ir.Constant(_INT, row)])), _FLOATS)
            for row in range(LANES)
        ]
        narrow = _declared(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", _PAIRS, [_FLOATS, _FLOATS])
        with cgutils.for_range(builder, count_) as loop:
            column = builder.mul(loop.index, ir.Constant(loop.index.type, COLUMNS))
            rows = []
            for row in range(LANES):
                begin = builder.add(codes_, builder.mul(stride_, ir.Constant(stride_.type, row)))
                at = builder.add(begin, column)
                pair = builder.load(_pointer(builder, at, _WORDS), align=1)
                even = _scaled(builder, builder.shl(pair, _all(_WORDS, 8)), factors[row])
                odd = _scaled(builder, pair, factors[row])
                halves = builder.call(narrow, [odd, even])  # 16 even ones, then 16 odd ones
                order = [i // 2 + LANES * (i % 2) for i in range(COLUMNS)]
                mixed = builder.shuffle_vector(
                    halves, ir.Constant(_PAIRS, ir.Undefined), ir.Constant(ir.VectorType(_INT, COLUMNS), order)
                )
                rows.append(builder.bitcast(mixed, _INTS))
            for number, vector in enumerate(_transposed(builder, rows)):
                byte = builder.add(
                    builder.mul(column, ir.Constant(column.type, 32)), ir.Constant(column.type, 64 * number)
                )
                builder.store(vector, _pointer(builder, builder.add(out_, byte), _INTS), align=64)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp, types.intp), build


def _add_pairs(typingctx: Any, sums: Any, pairs: Any, x: Any, stride: Any, count: Any) -> Any:
    """4 x 16 fp32 `sums` += the `count` pairs of columns at `pairs` times those of 4 bf16 rows at `x`."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums_, pairs_, x_, stride_, count_ = arguments
        product = _declared(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, [_FLOATS, _PAIRS, _PAIRS])
        places = [
            _pointer(builder, builder.add(sums_, ir.Constant(sums_.type, 64 * row)), _FLOATS) for row in range(ROWS)
        ]
        sums = [cgutils.alloca_once_value(builder, builder.load(place, align=64)) for place in places]
        with cgutils.for_range(builder, count_) as loop:
            at = builder.mul(loop.index, ir.Constant(loop.index.type, 64))
            weights = builder.bitcast(builder.load(_pointer(builder, builder.add(pairs_, at), _INTS), align=64), _PAIRS)
            here = builder.add(x_, builder.mul(loop.index, ir.Constant(loop.index.type, 4)))
            for row, total in enumerate(sums):
                value_at = builder.add(here, builder.mul(stride_, ir.Constant(stride_.type, row)))
                pair = _splat(builder, builder.load(_pointer(builder, value_at, _INT), align=4), _INTS)
                values = builder.bitcast(pair, _PAIRS)
                builder.store(builder.call(product, [builder.load(total), weights, values]), total)
        for total, place in zip(sums, places, strict=True):
            builder.store(builder.load(total), place, align=64)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp, types.intp), build


def _load_float(typingctx: Any, address: Any) -> Any:
    """The fp32 number at `address`."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_pointer(builder, arguments[0], _FLOAT))

    return types.float32(types.intp), build


def _store_float(typingctx: Any, address: Any, value: Any) -> Any:
    """Put the fp32 number `value` at `address`."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[1], _pointer(builder, arguments[0], _FLOAT))
        return context.get_dummy_value()

    return types.void(types.intp, types.float32), build


# What numba calls with the addresses has fewer arguments than what describes it; hence Any.
decode_pairs: Any = intrinsic(_decode_pairs)
add_pairs: Any = intrinsic(_add_pairs)
load_float: Any = intrinsic(_load_float)
store_float: Any = intrinsic(_store_float)
