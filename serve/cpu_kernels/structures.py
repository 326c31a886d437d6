"""The structures that step.cpp takes, field by field."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int, c_int64, c_void_p


class NormView(Structure):
    _fields_ = (("weight", c_void_p), ("eps", c_float), ("kind", c_int))


class BlockView(Structure):
    _fields_ = (
        ("matrices", c_int * 4),
        ("loras", c_int * 4),
        ("norms", NormView * 4),
        ("q", NormView),
        ("k", NormView),
        ("head_norms", c_int),
        ("whole_norms", c_int),
        ("cos_sin", c_void_p),
        ("rotary", c_int),
        ("interleaved", c_int),
        ("window", c_int),
        ("scale", c_float),
        ("cap", c_float),
    )


class ShapeView(Structure):
    _fields_ = (
        ("hidden", c_int),
        ("heads", c_int),
        ("kv_heads", c_int),
        ("head", c_int),
        ("inner", c_int),
        ("activation", c_int),
        ("parallel", c_int),
        ("embedding_by", c_float),
        ("residual_by", c_float),
        ("logits_cap", c_float),
        ("logits_by", c_float),
        ("embedding", c_void_p),
        ("last", NormView),
    )


class GroupView(Structure):
    _fields_ = (("table", c_void_p), ("stride", c_int64), ("slots", c_void_p))
