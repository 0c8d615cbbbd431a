"""Short pieces of what the TPU compiler writes and a CPU's does not, from libtpu 0.0.42.

Shortened: only unused attributes and layouts' tiling of some arrays were taken out.
"""

# A batched product is a convolution whose batch axis is a dilated window.
BATCHED_PRODUCT = """\
HloModule batched, is_scheduled=true

ENTRY %main (q: bf16[2,128,256], k: bf16[2,512,256]) -> f32[2,128,512] {
  %q = bf16[2,128,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[2,512,256]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %convolution-base-dilated.64 = f32[2,128,512]{2,1,0:T(8,128)} convolution(%q, %k), \
window={size=2 lhs_dilate=2}, dim_labels=0bf_0oi->0bf, metadata={op_name="jit(f)/dot_general"}
}
"""

# A loop as a fusion hides its counter; its trips are in the condition, not in a note.
LOOP = """\
HloModule loop, is_scheduled=true

%count (c: s32[]) -> s32[] {
  %c = s32[]{:T(128)} parameter(0)
  %one = s32[]{:T(128)} constant(3)
  ROOT %next = s32[]{:T(128)} add(%c, %one)
}

%wide.body (wide.param: (s32[], bf16[64,64], s32[])) -> (s32[], bf16[64,64], s32[]) {
  %wide.param = (s32[]{:T(128)}, bf16[64,64]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%wide.param), index=0
  %x = bf16[64,64]{1,0:T(8,128)(2,1)} get-tuple-element(%wide.param), index=1
  %n = s32[]{:T(128)} get-tuple-element(%wide.param), index=2
  %fusion = s32[]{:T(128)} fusion(%i), kind=kLoop, calls=%count
  %convolution.1 = bf16[64,64]{1,0:T(8,128)(2,1)} convolution(%x, %x), dim_labels=bf_io->bf
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[64,64]{1,0}, /*index=2*/s32[]{:T(128)}) \
tuple(%fusion, %convolution.1, %n)
}

%wide.cond (wide.param.1: (s32[], bf16[64,64], s32[])) -> pred[] {
  %wide.param.1 = (s32[]{:T(128)}, bf16[64,64]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%wide.param.1), index=0
  %n.1 = s32[]{:T(128)} get-tuple-element(%wide.param.1), index=2
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.1, %n.1), direction=DIRECTION
}

ENTRY %main.1 (p: bf16[64,64]) -> bf16[64,64] {
  %p = bf16[64,64]{1,0:T(8,128)(2,1)} parameter(0)
      %start = s32[]{:T(128)} constant(START)
  %stop = s32[]{:T(128)} constant(STOP)
  %copy.1 = s32[]{:T(128)} copy(%start)
  %tuple = (s32[]{:T(128)}, bf16[64,64]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) \
tuple(%copy.1, %p, %stop)
  %while.1 = (s32[]{:T(128)}, bf16[64,64]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) while(%tuple), \
condition=%wide.cond, body=%wide.body, metadata={op_name="jit(f)/while"}
  ROOT %out = bf16[64,64]{1,0:T(8,128)(2,1)} get-tuple-element(%while.1), index=1
}
"""

# Reduce-scatter is a fusion of all-reduce and this device's slice. A permute starts and ends, its
# result in fast memory. The last all-reduce names its groups by mesh axes.
EXCHANGES = """\
HloModule exchanges, is_scheduled=true

%add (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[]{:T(256)} parameter(0)
  %y = bf16[]{:T(256)} parameter(1)
  ROOT %sum = bf16[]{:T(256)} add(%x, %y)
}

%all-reduce-scatter.clone.1 (input.24: bf16[256,2,128]) -> bf16[128,2,128] {
  %input.24 = bf16[256,2,128]{2,0,1:T(8,128)(2,1)} parameter(0)
  %all-reduce.272 = bf16[256,2,128]{2,0,1:T(8,128)(2,1)} all-reduce(%input.24), channel_id=58, \
replica_groups={{0,1},{2,3}}, use_global_device_ids=true, to_apply=%add
  %id = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %dynamic-slice.1113 = bf16[128,2,128]{2,0,1:T(8,128)(2,1)} \
dynamic-slice(%all-reduce.272, %id, %zero, %zero), dynamic_slice_sizes={128,2,128}
}

ENTRY %main (p: bf16[256,2,128], z: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[256,2,128]{2,0,1:T(8,128)(2,1)} parameter(0)
  %z = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(1)
  %fusion.1 = bf16[128,2,128]{2,0,1:T(8,128)(2,1)} fusion(%p), kind=kCustom, \
calls=%all-reduce-scatter.clone.1
  %collective-permute-start.2 = (bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}\
, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%z), channel_id=1, \
source_target_pairs={{0,2},{2,0},{1,3},{3,1}}
  %all-gather-start.1 = (bf16[8,128]{1,0}, bf16[16,128]{1,0}) all-gather-start(%z), \
channel_id=2, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}, use_global_device_ids=true
  %collective-permute-done.2 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} \
collective-permute-done(%collective-permute-start.2)
  %all-gather-done.1 = bf16[16,128]{1,0} all-gather-done(%all-gather-start.1)
  ROOT %all-reduce.9 = bf16[8,128]{1,0:T(8,128)(2,1)} all-reduce(%collective-permute-done.2), \
channel_id=3, replica_groups=mesh['axis_0'=1,'axis_1'=2,'axis_2'=2], \
device_ids=([2,2]T(1,0)) {'axis_1'}, use_global_device_ids=true, to_apply=%add
}
"""

# Splash attention states no cost; an attribute breaks its line in two. Another kernel states one.
KERNELS = """\
HloModule kernels, is_scheduled=true

ENTRY %main (q: bf16[2,512,128], k: bf16[2,1024,128], m: s8[1,4,8]) -> bf16[2,512,128] {
  %q = bf16[2,512,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[2,1024,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %m = s8[1,4,8]{2,1,0:T(4,128)(4,1)} parameter(2)
  %custom-call.9 = bf16[2,512]{1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  %splash_mha_fwd_residuals.1 = (f32[128,128]{1,0:T(8,128)}, bf16[2,512,128]{2,1,0:T(8,128)(2,1)}) \
custom-call(%m, %q, %k, %k), custom_call_target="tpu_custom_call", \
operand_layout_constraints={s8[1,4,8]{2,1,0}, bf16[2,512,128]{2,1,0}, bf16[2,1024,128]{2,1,0}, \
bf16[2,1024,128]{2,1,0}}, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128, \\"use_fused_bwd_kernel\\": false}"
}}, metadata={op_name="jit(f)/splash_mha_fwd_residuals/pallas_call"}, \
backend_config={"custom_call_config":{"body":"TUzv","needs_layout_passes":true}}
  %mykern.clone.2 = f32[512,512]{1,0:T(8,128)} custom-call(%q), \
custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[2,512,128]{2,1,0}}, \
backend_config={"custom_call_config":{"body":"TUzv","cost_estimate":{"flops":"1234567",\
"transcendentals":"5","bytes_accessed":"777","remote_bytes_transferred":"0"}}}
  %secret.3 = f32[8,8]{1,0:T(8,128)} custom-call(%q), custom_call_target="tpu_custom_call"
  ROOT %out = bf16[2,512,128]{2,1,0:T(8,128)(2,1)} \
get-tuple-element(%splash_mha_fwd_residuals.1), index=1
}
"""
