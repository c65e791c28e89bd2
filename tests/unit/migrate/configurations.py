"""Small configurations of other trainers, with the keys that their published examples have."""

TRL = """
model_name_or_path: Qwen/Qwen2-0.5B-Instruct
dataset_name: trl-lib/ultrafeedback_binarized
learning_rate: 5.0e-7
num_train_epochs: 1
per_device_train_batch_size: 2
max_steps: 1000
gradient_accumulation_steps: 8
eval_strategy: steps
eval_steps: 50
output_dir: Qwen2-0.5B-DPO
remove_unused_columns: false
warmup_ratio: 0.1
beta: 0.05
bf16: true
report_to: none
"""

SWIFT = """
# One GPU of 24 GiB.
CUDA_VISIBLE_DEVICES=0 \\
swift rlhf \\
    --rlhf_type dpo \\
    --model Qwen/Qwen2.5-7B-Instruct \\
    --train_type lora \\
    --dataset org/preferences \\
    --load_from_cache_file true \\
    --split_dataset_ratio 0.01 \\
    --torch_dtype bfloat16 \\
    --num_train_epochs 1 \\
    --per_device_train_batch_size 1 \\
    --per_device_eval_batch_size 1 \\
    --learning_rate 1e-4 \\
    --lora_rank 8 \\
    --lora_alpha 32 \\
    --target_modules all-linear \\
    --gradient_accumulation_steps 16 \\
    --eval_steps 50 \\
    --save_steps 50 \\
    --save_total_limit 2 \\
    --logging_steps 5 \\
    --max_length 2048 \\
    --output_dir output \\
    --warmup_ratio 0.05 \\
    --dataloader_num_workers 4 \\
    --rpo_alpha 0.1 \\
    --dataset_num_proc 4
"""

MEGATRON_SWIFT = """
NPROC_PER_NODE=8 \\
megatron rlhf \\
    --rlhf_type dpo \\
    --model Qwen/Qwen3-30B-A3B-Instruct-2507 \\
    --save_safetensors true \\
    --dataset org/preferences \\
    --split_dataset_ratio 0.01 \\
    --tensor_model_parallel_size 4 \\
    --expert_tensor_parallel_size 1 \\
    --expert_model_parallel_size 8 \\
    --moe_permute_fusion true \\
    --moe_grouped_gemm true \\
    --moe_aux_loss_coeff 1e-3 \\
    --micro_batch_size 1 \\
    --global_batch_size 4 \\
    --recompute_granularity full \\
    --recompute_method uniform \\
    --recompute_num_layers 1 \\
    --num_train_epochs 1 \\
    --finetune true \\
    --cross_entropy_loss_fusion true \\
    --lr 1e-5 \\
    --lr_warmup_fraction 0.05 \\
    --min_lr 1e-6 \\
    --output_dir megatron_output \\
    --eval_steps 200 \\
    --save_steps 200 \\
    --max_length 8192 \\
    --dataloader_num_workers 8 \\
    --no_save_optim true \\
    --sequence_parallel true \\
    --attention_backend flash \\
    --beta 0.1 \\
    --rpo_alpha 0.1 \\
    --loss_type sigmoid
"""

LLAMA_FACTORY = """
### model
model_name_or_path: Qwen/Qwen3-4B-Instruct-2507
trust_remote_code: true

### method
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.1
pref_loss: simpo

### dataset
dataset: dpo_demo
template: qwen3_nothink
cutoff_len: 2048
max_samples: 1000
preprocessing_num_workers: 16

### output
output_dir: saves/dpo
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""

AXOLOTL = """
base_model: meta-llama/Meta-Llama-3-8B-Instruct
model_type: LlamaForCausalLM
tokenizer_type: AutoTokenizer
special_tokens:
  pad_token: <|finetune_right_pad_id|>
load_in_8bit: true
load_in_4bit: false
chat_template: llama3
rl: dpo
datasets:
  - path: org/first
    type: chat_template.default
    field_chosen: chosen
    field_rejected: rejected
    roles:
      user: [user]
  - path: org/second
    type: chat_template.default
dataset_prepared_path:
val_set_size: 0.05
output_dir: ./outputs/lora-out
sequence_len: 4096
sample_packing: false
adapter: lora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_torch_fused
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
save_steps: 200
weight_decay: 0.0
"""

NEMO_RL = """
dpo:
  max_num_epochs: 1
  max_num_steps: 150
  val_period: 25
  val_batches: 8
  val_at_start: true
  seed: 42
  reference_policy_kl_penalty: 0.05
  preference_average_log_probs: False
  sft_average_log_probs: ${.preference_average_log_probs}
  preference_loss_weight: 1
  sft_loss_weight: 0
checkpointing:
  enabled: true
  checkpoint_dir: "results/dpo"
  keep_top_k: 3
  save_period: 50
policy:
  model_name: "meta-llama/Llama-3.2-1B-Instruct"
  tokenizer:
    name: ${policy.model_name}
    chat_template_kwargs: null
  train_global_batch_size: 128
  train_micro_batch_size: 2
  max_total_sequence_length: 1024
  precision: "bfloat16"
  dtensor_cfg:
    enabled: false
    tensor_parallel_size: 1
  dynamic_batching:
    enabled: false
  max_grad_norm: 1.0
  optimizer:
    name: "torch.optim.AdamW"
    kwargs: {lr: 5.0e-6, betas: [0.9, 0.98]}
  scheduler:
    - name: "torch.optim.lr_scheduler.LinearLR"
      kwargs: {start_factor: 0.1}
    - milestones: [20]
  megatron_cfg:
    enabled: true
    tensor_model_parallel_size: 2
    pipeline_model_parallel_size: 1
    sequence_parallel: true
    optimizer:
      optimizer: "adam"
      lr: 5.0e-6
      min_lr: 5.0e-6
      weight_decay: 0.1
      bf16: true
      adam_beta2: 0.98
      use_distributed_optimizer: true
      clip_grad: ${policy.max_grad_norm}
    scheduler:
      lr_decay_style: "constant"
      lr_warmup_iters: 1
    distributed_data_parallel_config:
      overlap_grad_reduce: true
      data_parallel_sharding_strategy: "optim_grads_params"
    fp8_cfg: {enabled: false, fp8: "e4m3"}
data:
  shuffle: true
  train:
    data_path: pairs.jsonl
  validation:
    data_path: heldout.jsonl
logger:
  log_dir: "logs"
cluster:
  gpus_per_node: 8
"""

OPENRLHF = """
set -x

read -r -d '' training_commands <<EOF
openrlhf.cli.train_dpo \\
   --save_path ./checkpoint/llama3-8b-dpo \\
   --save_steps -1 \\
   --logging_steps 1 \\
   --eval_steps -1 \\
   --train_batch_size 256 \\
   --micro_train_batch_size 1 \\
   --pretrain OpenRLHF/Llama-3-8b-sft-mixture \\
   --param_dtype bf16 \\
   --max_epochs 1 \\
   --max_len 8192 \\
   --learning_rate 5e-7 \\
   --beta 0.1 \\
   --dataset org/preferences \\
   --apply_chat_template \\
   --chosen_key chosen \\
   --adam_betas 0.9 0.98 \\
   --attn_implementation flash_attention_2 \\
   --load_checkpoint \\
   --packing_samples \\
   --gradient_checkpointing
EOF
    # --ipo [for IPO]

if [[ ${1} != "slurm" ]]; then
    torchrun --standalone --nproc-per-node ${NPROC_PER_NODE:-8} -m $training_commands
fi
"""

#: Name of the table -> file ending, text.
ALL = {
    "trl": (".yaml", TRL),
    "ms-swift": (".sh", SWIFT),
    "megatron-swift": (".sh", MEGATRON_SWIFT),
    "llama-factory": (".yaml", LLAMA_FACTORY),
    "axolotl": (".yml", AXOLOTL),
    "nemo-rl": (".yaml", NEMO_RL),
    "openrlhf": (".sh", OPENRLHF),
}
