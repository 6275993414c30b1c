"""Tiny configurations for every model of mlx-lm, as data.

A configuration is ``TINY``, the values of all fields that any model knows, with the few values
that one model needs otherwise, from ``OWN``; a model takes the fields it has.
"""

VOCABULARY = 97
WINDOW = 24

# value: the fields of mlx-lm's model arguments that have it
BY_VALUE = (
    (VOCABULARY, "vocab_size num_vocab embedding_size vocab_size_per_layer_input"),
    (WINDOW, "sliding_window sliding_window_size attention_window_size window_size"),
    (WINDOW, "loop_window_size attention_chunk_size"),
    (32, "hidden_size hidden_dim d_model model_dim n_embd dim_model_base block_dim mamba_d_ssm"),
    (48, "intermediate_size ff_intermediate_size dense_intermediate_size intermediate_size_mlp"),
    (48, "ffn_hidden_size block_ff_dim n_inner"),
    (96, "mlp_hidden_size"),
    (16, "moe_intermediate_size expert_ffn_hidden_size moe_hidden_size share_expert_dim"),
    (16, "shared_intermediate_size shared_expert_intermediate_size"),
    (16, "moe_shared_expert_intermediate_size qk_head_dim kv_lora_rank q_lora_rank"),
    (16, "index_head_dim index_topk mamba_chunk_size"),
    (8, "head_dim kv_channels v_head_dim hidden_size_per_head qk_nope_head_dim qk_rope_head_dim"),
    (8, "rotary_dim query_pre_attn_scalar block_multiple_of hidden_size_per_layer_input"),
    (8, "laurel_rank linear_key_head_dim linear_value_head_dim mamba_d_state mamba_d_head"),
    (8, "mamba_head_dim ssm_state_size state_size a_low_rank_dim v_low_rank_dim"),
    (8, "gate_low_rank_dim decay_low_rank_dim ffn_dim_divisor"),
    (3, "num_hidden_layers num_layers n_layer n_layers num_transformer_layers layer_group_size"),
    (3, "sliding_window_pattern full_attention_interval linear_conv_kernel_dim conv_L_cache"),
    (3, "mamba_d_conv conv_kernel conv1d_width attn_layer_period"),
    (4, "num_attention_heads num_heads n_head n_heads linear_num_value_heads mamba_n_heads"),
    (4, "mamba_num_heads mamba_dt_rank time_step_rank num_experts num_local_experts"),
    (4, "n_routed_experts moe_num_experts"),
    (2, "num_key_value_heads num_kv_heads n_kv_heads num_attention_groups linear_num_key_heads"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k index_n_heads"),
    (2, "mamba_expand conv_window cla_share_factor altup_num_inputs expert_layer_period"),
    (2, "dense_attention_every_n_layers n_shared_head num_kv_reuse_layers"),
    (1, "n_shared_experts num_shared_experts num_shared_expert moe_num_shared_experts n_group"),
    (1, "topk_group moe_layer_freq first_k_dense_replace num_dense_layers decoder_sparse_step"),
    (1, "mamba_n_groups n_groups group_norm_size attn_layer_offset expert_layer_offset"),
    (1, "zero_expert_num"),
    (0, "altup_active_idx"),
    (512, "max_position_embeddings n_ctx n_positions model_max_length block_size"),
    (512, "original_max_position_embeddings"),
    (1e-5, "rms_norm_eps norm_eps layer_norm_eps layer_norm_epsilon layernorm_epsilon"),
    (1e-5, "norm_epsilon post_norm_eps"),
    (10000.0, "rope_theta rotary_emb_base"),
    (1000.0, "rope_local_base_freq swa_rope_theta"),
    (100.0, "altup_coef_clip"),
    (50.0, "attn_logit_softcapping"),
    (30.0, "final_logit_softcapping logits_soft_cap"),
    (20.0, "gegelu_limit"),
    (1.5, "hidden_dim_scale_factor"),
    (1.0, "embedding_multiplier residual_multiplier logits_scaling scale_emb scale_depth"),
    (1.0, "routed_scaling_factor block_ffn_dim_multiplier output_multiplier"),
    (0.5, "rotary_pct partial_rotary_factor"),
    (0.35, "attention_multiplier"),
    (0.1, "logit_scale"),
    (False, "tie_word_embeddings attention_bias mlp_bias use_bias use_qkv_bias layer_norm_bias"),
    (False, "conv_bias mamba_proj_bias"),
    (True, "qk_norm post_norm use_qk_norm norm_topk_prob block_auto_adjust_ff_dim use_conv_bias"),
    (True, "mamba_conv_bias altup_correct_scale use_expert_bias use_mixed_mlp_moe use_cla"),
    (True, "mla_scale_q_lora mla_scale_kv_lora linear_allow_neg_eigval"),
    (None, "rope_scaling layer_types"),
    ("silu", "hidden_act"),
    ("sigmoid", "scoring_func"),
    ("noaux_tc", "topk_method"),
    ("identity", "zero_expert_type"),
    ("MLA", "attention_method"),
)
TINY = {field: value for value, fields in BY_VALUE for field in fields.split()}
TINY |= {"mlp_only_layers": [], "full_attn_idxs": [1], "time_step_limit": (0.001, 100.0)}

SLIDES, FULL = "sliding_attention", "full_attention"
KINDS = [SLIDES, FULL, SLIDES]
ROPES = {SLIDES: {"rope_theta": 1000.0}, FULL: {"rope_theta": 10000.0}}
YARN = dict(type="yarn", rope_type="yarn", factor=2.0, mscale=1.0, mscale_all_dim=1.0)
YARN |= dict(rope_theta=10000.0, original_max_position_embeddings=256, llama_4_scaling_beta=0.1)
LONG = dict(original_max_position_embeddings=512, short_factor=[1.0] * 4, long_factor=[1.0] * 4)
KDA = dict(kda_layers=[1, 3], full_attn_layers=[2], num_heads=4, head_dim=8)
PACKED = dict(path="model.layers.1.mlp.shared_expert.up_proj", dtype="float16")
GEMMA4 = dict(num_hidden_layers=6, num_kv_shared_layers=3, global_head_dim=16)

OWN = {
    "afmoe": dict(layer_types=KINDS),
    "baichuan_m1": dict(sliding_window_layers=[0, 2], num_swa_key_value_heads=1),
    "dbrx": dict(
        ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2),
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
    ),
    "deepseek_v2": dict(rope_scaling=YARN),
    "exaone4": dict(sliding_window_pattern="LLG"),
    "exaone_moe": dict(layer_types=KINDS, is_moe_layer=[False, True, True]),
    "gear": dict(layer_types=[FULL, SLIDES, "conv_mixer"]),
    # With grouped heads mlx-lm cannot batch it: its mask meets the heads.
    "gemma2": dict(num_key_value_heads=4),
    "gemma3n": dict(
        num_hidden_layers=5,
        num_kv_shared_layers=2,
        layer_types=[SLIDES, FULL, SLIDES, FULL, SLIDES],
        activation_sparsity_pattern=[0.5, 0, 0, 0, 0],
    ),
    "gemma4": GEMMA4,
    "gemma4_text": GEMMA4,
    "glm_moe_dsa": dict(rope_parameters=dict(rope_theta=10000.0)),
    "gpt_oss": dict(layer_types=KINDS),
    "granitemoehybrid": dict(layer_types=["mamba", "attention", "mamba"]),
    "hunyuan": dict(rope_scaling=dict(alpha=1000.0, factor=1.0, type="dynamic")),
    "kimi_k3": dict(hidden_act="situ", linear_attn_config=KDA | dict(short_conv_kernel_size=3)),
    "kimi_linear": dict(linear_attn_config=KDA | dict(short_conv_kernel_size=3)),
    "laguna": dict(layer_types=KINDS, num_attention_heads_per_layer=[4, 2, 8]),
    "lille-130m": dict(n_embd=256),
    "llama4": dict(num_hidden_layers=4, num_experts_per_tok=1, interleave_moe_layer_step=2),
    "llama4_text": dict(no_rope_layers=[1, 0, 1]),
    "longcat_flash_ngram": dict(ngram_vocab_size_ratio=5),
    "mellum": dict(layer_types=KINDS, rope_parameters=ROPES),
    "mimo_v2_flash": dict(
        hybrid_layer_pattern=[1, 0, 1],
        moe_layer_freq=[0, 1, 1],
        add_swa_attention_sink_bias=True,
        add_full_attention_sink_bias=False,
        swa_num_attention_heads=8,
        swa_num_key_value_heads=4,
        swa_head_dim=24,
        swa_v_head_dim=16,
        head_dim=16,
    ),
    "minicpm3": dict(rope_scaling=LONG),
    "minimax_m3_vl": dict(
        moe_layer_freq=[0, 1, 1],
        sparse_attention_freq=[0, 1, 1],
        index_block_size=4,
        index_topk_blocks=3,
    ),
    "ministral3": dict(layer_types=KINDS, rope_parameters=YARN),
    "mistral3": dict(model_type="ministral3", layer_types=KINDS, rope_parameters=YARN),
    "mistral4": dict(rope_parameters=YARN),
    "muse_glimmer": dict(layer_types=KINDS),
    "muse_spark": dict(
        rope_parameters=dict(rope_theta=10000.0),
        layer_rope_theta=[10000.0, 0, 10000.0],
        layer_types=KINDS,
        num_shared_experts=0,
    ),
    "nemotron-nas": dict(
        block_configs=[
            dict(attention=dict(n_heads_in_group=2), ffn=dict(ffn_mult=1.0)),
            dict(attention=dict(no_op=True), ffn=dict(ffn_mult=1.0)),
            dict(attention=dict(n_heads_in_group=4), ffn=dict(no_op=True)),
        ]
    ),
    "nemotron_h": dict(hybrid_override_pattern=["M", "*", "-", "E"]),
    "olmo3": dict(layer_types=KINDS),
    "olmo_hybrid": dict(layer_types=["linear_attention", FULL, "linear_attention"]),
    "openelm": dict(
        num_query_heads=[4, 4, 8], num_kv_heads=[2, 1, 2], ffn_multipliers=[1.0, 1.5, 2.0]
    ),
    # Token ids above 100,000 are written into its logits.
    "phi3small": dict(
        vocab_size=100352,
        blocksparse_block_size=32,
        blocksparse_num_local_blocks=2,
        blocksparse_vert_stride=2,
    ),
    "phimoe": dict(rope_scaling=LONG | dict(short_mscale=1.0, long_mscale=1.0)),
    "prism_hadamard_qwen35": dict(
        hidden_size=128,
        schema_version=1,
        tensor_namespace="mlx-lm-text",
        quantization=dict(bits=2, group_size=128, mode="affine"),
        modules=[PACKED | dict(embedding=False, block=0)],
    ),
    "recurrent_gemma": dict(
        block_types=["recurrent", "attention", "recurrent"], num_key_value_heads=1
    ),
    "spark2_5": dict(layer_types=KINDS, hidden_act="gelu", rope_parameters=ROPES),
    "step3p5": dict(
        layer_types=KINDS,
        attention_other_setting=dict(num_attention_heads=8, num_attention_groups=4),
    ),
}

# Other shapes of a family, as "family: what is different".
VARIANTS = {
    "afm7: one kv head": dict(num_kv_heads=1),
    "baichuan_m1: all windows": dict(sliding_window_layers=[0, 1, 2]),
    "cohere2: window 5": dict(sliding_window=5),
    "deepseek_v3: no q_lora": dict(q_lora_rank=None),
    "gear: no softcap": dict(attn_logit_softcapping=None),
    "gemma3_text: window 5": dict(sliding_window=5),
    "gemma4_text: K is V": dict(attention_k_eq_v=True, num_global_key_value_heads=1),
    "gemma4_text: nothing shared": dict(num_kv_shared_layers=0),
    "gpt_oss: window 5": dict(sliding_window=5),
    "granitemoehybrid: no rope": dict(position_embedding_type="nope"),
    "hunyuan: nothing shared": dict(use_cla=False),
    "kimi_k3: output gate": dict(mla_use_output_gate=True),
    "laguna: no gate": dict(gating=False),
    "llama: head_dim 80": dict(head_dim=80),
    "llama: head_dim 12": dict(head_dim=12),
    "llama: head_dim 256": dict(head_dim=256),
    "llama: one kv head": dict(num_key_value_heads=1),
    "llama: as many kv heads": dict(num_key_value_heads=4),
    "llama: three heads a group": dict(num_attention_heads=6),
    "llama: windows": dict(layer_types=KINDS),
    "llama: a window of one": dict(layer_types=KINDS, sliding_window=1),
    "mimo_v2_flash: all sinks": dict(add_full_attention_sink_bias=True),
    "minimax_m3_vl: dense": dict(sparse_attention_freq=[0, 0, 0]),
    "nanbeige: loops": dict(num_loops=2),
    "phi3: long rope": dict(
        partial_rotary_factor=1.0,
        rope_scaling=dict(
            type="longrope", rope_type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4
        ),
    ),
    "phi3small: dense": dict(dense_attention_every_n_layers=4),
    "recurrent_gemma: window 5": dict(attention_window_size=5),
    "step3p5: one geometry": dict(attention_other_setting=None),
}
