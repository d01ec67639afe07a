"""``HiCacheStorage`` of SGLang 0.5.23, as the adapter was written for it: parameters of its methods, and which of them
a backend must have. The tests of the engines compare it with the release that is installed."""

_KEY = ["self", "key", "target_location", "target_sizes"]
_POOL = ["self", "keys", "host_indices", "extra_info"]
_TRANSFERS = ["self", "transfers", "extra_info"]
INTERFACE: dict[str, tuple[list[str], bool]] = {
    "register_mem_pool_host": (["self", "mem_pool_host"], False),
    "register_mem_host_pool_v2": (["self", "host_pool", "host_pool_name"], False),
    "on_host_pools_registered": (["self"], False),
    "batch_exists_v2": (["self", "keys", "pool_transfers", "extra_info"], False),
    "batch_get_v2": (_TRANSFERS, False),
    "batch_set_v2": (_TRANSFERS, False),
    "batch_get_v1": (_POOL, False),
    "batch_set_v1": (_POOL, False),
    "get": (_KEY, True),
    "batch_get": (["self", "keys", "target_locations", "target_sizes"], True),
    "set": (["self", "key", "value", "target_location", "target_sizes"], True),
    "batch_set": (["self", "keys", "values", "target_locations", "target_sizes"], True),
    "exists": (["self", "key"], True),
    "batch_exists": (["self", "keys", "extra_info"], False),
    "clear": (["self"], False),
    "get_stats": (["self"], False),
}
# Fields of what it is given and gives back.
CONFIG = ["tp_rank", "tp_size", "pp_rank", "pp_size", "attn_cp_rank", "attn_cp_size", "is_mla_model"]
CONFIG += ["enable_storage_metrics", "is_page_first_layout", "model_name", "tp_lcm_size", "should_split_heads"]
CONFIG += ["dp_rank", "extra_config", "dcp_size", "dcp_rank", "logical_page_size"]
TRANSFER = ["name", "host_indices", "device_indices", "keys", "hit_policy", "nodes_to_load", "indices_from_pool"]
TRANSFER += ["block_pages", "group_pages"]
RESULT = ["kv_hit_pages", "extra_pool_hit_pages", "restorable_prefix_pages"]
POLICIES = ["all_pages", "trailing_pages", "block_groups"]
