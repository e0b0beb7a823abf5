"""Records what Ray Serve answers for a list of results: ``python reference_results.py`` in an environment that has
``ray[serve]`` and numpy writes reference_results.json beside this file, which test_responses.py holds us against.

The results are written as expressions, so that both sides make their own.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

RESULTS = [
    "None",
    "b'raw\\xff'",
    "b''",
    "'text'",
    "'näïve ☃ \\x7f'",
    "''",
    "True",
    "0",
    "-1.5",
    "1e16",
    "1e-7",
    "[1e-5, 123456789012345678901234567890]",
    "float('nan')",
    "[None, float('inf'), -float('inf')]",
    "{'a': [1, (2, 3)], 'b': {'c': None}}",
    "{1: 'int key', None: 'none key', True: 'bool key', 1.5: 'float key'}",
    "{'_sa_instance_state': 1, '_s': 2}",
    "{'quote': '\"\\\\\\n\\t\\x00'}",
    "datetime.datetime(2024, 2, 29, 12, 30, 1, 5)",
    "datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.timezone.utc)",
    "datetime.date(2024, 2, 29)",
    "datetime.timedelta(days=1, microseconds=1)",
    "uuid.UUID(int=5)",
    "decimal.Decimal('1.50')",
    "decimal.Decimal('12')",
    "{3}",
    "pathlib.PurePosixPath('/a/b')",
    "collections.OrderedDict(b=1, a=2)",
    "collections.deque([1, 2])",
    "collections.namedtuple('P', 'x y')(1, 2)",
    "enum.Enum('E', {'A': 'value'}).A",
    "enum.IntEnum('I', {'A': 7}).A",
    "(i * i for i in range(3)).__reduce__ and [i * i for i in range(3)]",
    "{'items': (i for i in range(3))}",
    "ValueError('message', 2)",
    "[KeyError('k')]",
    "ipaddress.ip_address('10.0.0.1')",
    "re.compile('a+')",
    "types.SimpleNamespace(a=1, b='x')",
    "np.array([[1.5, 2], [np.nan, 4]], dtype=np.float32)",
    "np.arange(3, dtype=np.uint8)",
    "np.array(['a', 'b'])",
    "np.array([True, False])",
    "np.float32(0.1)",
    "np.int64(7)",
    "np.bool_(True)",
    "np.str_('s')",
    "{'predictions': np.array([0.25, 1e-9]), 'label': np.int64(3), 'none': None}",
    "np.array([2**63], dtype=np.uint64)",
]


def evaluate(expression: str) -> object:
    modules = ["collections", "datetime", "decimal", "enum", "ipaddress", "pathlib", "re", "types", "uuid"]
    return eval(expression, {"np": import_module("numpy"), **{name: import_module(name) for name in modules}})


def main() -> None:
    from ray.serve._private.http_util import convert_object_to_asgi_messages

    recorded = {}
    for expression in RESULTS:
        start, body = convert_object_to_asgi_messages(evaluate(expression))
        headers = [[name.decode(), value.decode()] for name, value in start["headers"]]
        recorded[expression] = {"status": start["status"], "headers": headers, "body": body["body"].decode("latin-1")}
    Path(__file__).with_suffix(".json").write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
