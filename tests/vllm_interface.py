"""vLLM's interface for connectors as ours was written for it: methods with their parameters, self left out."""

ABSTRACT = {
    "build_connector_meta",
    "get_num_new_matched_tokens",
    "request_finished_all_groups",
    "save_kv_layer",
    "start_load_kv",
    "update_state_after_alloc",
    "wait_for_layer_load",
    "wait_for_save",
}
PARAMETERS = {
    "__init__": "vllm_config role kv_cache_config",
    "bind_kv_cache_manager": "kv_cache_manager",
    "build_connector_meta": "scheduler_output",
    "get_block_ids_with_load_errors": "",
    "get_external_cache_hit_sources": "request num_external_tokens",
    "get_finished": "finished_req_ids",
    "get_num_new_matched_tokens": "request num_computed_tokens",
    "handle_preemptions": "kv_connector_metadata",
    "on_new_request": "request",
    "register_kv_caches": "kv_caches",
    "request_finished": "request block_ids",
    "request_finished_all_groups": "request block_ids",
    "requires_kv_delivery": "",
    "requires_piecewise_for_cudagraph": "extra_config",
    "reset_cache": "",
    "save_kv_layer": "layer_name kv_layer attn_metadata **kwargs",
    "shutdown": "",
    "start_load_kv": "forward_context **kwargs",
    "update_connector_output": "connector_output",
    "update_state_after_alloc": "request blocks num_external_tokens",
    "wait_for_layer_load": "layer_name",
    "wait_for_save": "",
}
SOURCES = {"DEVICE", "HOST", "DISK", "EXTERNAL_UNSPECIFIED"}  # of CacheHitSource, that we name
WRITES = "layer key value kv_cache slot_mapping"  # what an attention's do_kv_cache_update takes
