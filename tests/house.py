"""The tables of the house: floors, who may import what, lengths. tests/test_tidy.py holds the code to them."""

FILE_LINES, FUNCTION_LINES = 300, 60

# From the ground up; a module may import its own floor and those below, and never in a circle.
FLOORS = (
    "errors keeping",
    "keys layout lease files policy metrics histogram counters figures compiled xxh3 checksum sizes scratch",
    "block plan sealed cipher vault",
    "composition walk tensors",
    "pml",
    "tiers policies families",
    "index mover eviction match expiry rates kinds heading doomed remote.block remote.cutting",
    "known hot uses residency job remote",
    "room budget fetch erasure restore census notes waiting finder prospect segments",
    "writer load save discovery admission",
    "intake loader outlook upload prefetch keeper joiner",
    "store",
    "local",
    "daemon",
    "assembly",
    "config directory",
    "settings",
    "daemon.http",
    "kvstore",
    "daemon.serve",
    "adapters",
    "bench",
    "cli",
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}

GROUND = {"errors", "keys", "layout", "plan", "lease", "files", "policy", "policies", "metrics", "counters"}
FRAMEWORKS = {"huggingface_hub", "numpy", "peft", "safetensors", "torch", "transformers"}
THIRD_PARTY = {
    "block": {"msgpack", "xxhash"},
    "checksum": {"xxhash"},
    "cipher": {"cryptography", "msgpack"},
    "compiled": {"numba"},
    "xxh3": {"llvmlite", "numba", "xxhash"},
    "tiers": {"lmdb", "msgpack", "xxhash"},
    "tiers.device": {"torch"},
    "daemon.cuda": {"torch"},
    "tiers.redis": {"redis"},
    "tiers.redis_client": {"redis"},
    "adapters": FRAMEWORKS | {"xxhash"},
    "adapters.sglang.hicache": {"sglang"},
    "adapters.vllm.connector": {"torch", "vllm"},
    "adapters.vllm.rotation": {"torch", "transformers", "vllm"},
    "adapters.vllm.step": {"vllm"},
    "adapters.kvlink.__main__": FRAMEWORKS | {"rich", "typer"},
    "tensors": FRAMEWORKS | {"llvmlite", "numba", "triton"},
    "daemon.metrics": {"prometheus_client"},
    "settings": {"pydantic", "pydantic_core", "pydantic_settings", "yaml"},
    "cli": {"rich", "typer"},
    "cli.place": {"redis"},
}
# They see no concrete tier or policy, but those that are alone of their kind: host memory, and the order of the queue.
ONLY_PORTS = {"index", "mover", "eviction", "match", "known", "hot", "residency", "restore", "room", "fetch", "erasure"}
ONLY_PORTS |= {
    "writer",
    "load",
    "loader",
    "save",
    "store",
    "local",
    "census",
    "discovery",
    "finder",
    "admission",
    "keeper",
    "intake",
    "joiner",
    "doomed",
}
PORTS = {"tiers.base", "tiers.host", "policies.look_ahead"}
PUBLIC = {"kvstore", "errors", "keys", "layout", "match", "load", "save", "store", "tensors", "metrics", "adapters"}
PUBLIC |= {"plan", "policies", "composition", "assembly", "walk", "job"}
BANNED_MODULES = {"cloudpickle", "dill", "marshal", "pickle", "shelve"}
HOSTILE = {"tests.test_daemon_wire"}  # they make such bytes, to throw them at the daemon
BANNED_CALLS = {"eval", "exec", "torch.load", "yaml.load", "numpy.load", "np.load"}
# Top loops of threads and of a long run, which must survive anything: "module:function".
BROAD_EXCEPT = {
    "adapters.sglang.guard:answer",
    "adapters.transformers.ahead:_run",
    "adapters.transformers.loaded:_tried",
    "adapters.transformers.request:hear",
    "adapters.vllm.thread:_run",
    "daemon.server:_run",
    "mover:_work",
    "mover:_run",
    "compiled:_run",
    "tensors.streams:_run",
    "bench.gpu.__main__:measured",
}
