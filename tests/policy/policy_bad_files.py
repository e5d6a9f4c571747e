"""Policy files that cannot be used, each with the place and text of its error; and how to write one."""

from __future__ import annotations

from textwrap import dedent

DEFAULT = """
default:
  use: {backend: hybrid, fence_forward: []}
  because: nobody complained
"""


def with_rules(rules: str) -> str:
    """A file whose rules start at line 3."""
    return "version: 1\nrules:\n" + dedent(rules).strip("\n") + DEFAULT


def rule(when: str = "{gpu_arch: sm90}", use: str = "{backend: hybrid}", name: str = "one") -> str:
    """A file with one rule: name at line 3, when at line 4, use at line 5."""
    return with_rules(
        f"""
        - name: {name}
          when: {when}
          use: {use}
          because: seen
        """
    )


# What is wrong -> the file, and its error after the file's name.
BAD = {
    "empty": ("", "1:1: is empty; a policy has version, rules and default"),
    "only comments": ("# nothing\n", "1:1: is empty; a policy has version, rules and default"),
    "a list": ("- a\n- b\n", "1:1: is not a mapping with version, rules and default"),
    "a word": ("hello\n", "1:1: is not a mapping with version, rules and default"),
    "not YAML": (
        "version: 1\nrules: [1, 2\n",
        "3:1: not YAML: expected ',' or ']', but got '<stream end>'",
    ),
    "a tab": (
        "version: 1\n\trules: []\n",
        "2:1: not YAML: found character '\\t' that cannot start any token",
    ),
    "a control character": ("version: 1\nx: a\x07\n", "2:5: not YAML: the character '\\x07' is not allowed"),
    "two documents": ("version: 1\n---\nversion: 1\n", "2:1: not YAML: but found another document"),
    "an undefined alias": ("version: 1\nrules: *r\n", "2:8: not YAML: found undefined alias 'r'"),
    "a key twice": ("version: 1\nrules: []\nversion: 1\n", "3:1: the key 'version' is there twice"),
    "a nested key twice": (
        rule(use="{backend: hybrid, backend: copy_engine}"),
        "5:26: the key 'backend' is there twice",
    ),
    "a key that is no word": ("version: 1\n2: x\n", "2:1: the key 2 is not a word"),
    "an alias of itself": (
        "&p\nversion: 1\nrules: *p\n",
        "1:1: an alias stands for something that contains it",
    ),
    "a date": (rule(name="2020-01-01"), "3:9: only texts, numbers, true and false can stand here"),
    "a tag": (
        rule(name="!!python/name:os.system x"),
        "3:9: only texts, numbers, true and false can stand here",
    ),
    "version missing": ("rules: []" + DEFAULT, "1:1: 'version' is missing"),
    "version 2": (
        rule().replace("version: 1", "version: 2"),
        "1:10: this release reads version 1 of the policy format, not 2",
    ),
    "version 2 with keys of its own": (
        "layers: []\nversion: 2\n",
        "2:10: this release reads version 1 of the policy format, not 2",
    ),
    "version as text": (
        rule().replace("version: 1", "version: '1'"),
        "1:10: this release reads version 1 of the policy format, not '1' "
        "(did you mean 'version: 1, without quotes'?)",
    ),
    "version true": (
        rule().replace("version: 1", "version: true"),
        "1:10: this release reads version 1 of the policy format, not true (did you mean 'version: 1'?)",
    ),
    "rules missing": ("version: 1" + DEFAULT, "1:1: 'rules' is missing"),
    "default missing": (
        "version: 1\nrules: []\n",
        "1:1: 'default' is missing; 'extends: default' takes the shipped rules for all the rest",
    ),
    "rules empty": ("version: 1\nrules:" + DEFAULT, "2:1: rules must be a list; [] is an empty one"),
    "rules a mapping": (
        "version: 1\nrules: {a: 1}" + DEFAULT,
        "2:8: rules must be a list; [] is an empty one",
    ),
    "a rule that is a word": (with_rules("- fa3"), "3:3: a rule must be a mapping"),
    "a rule without because": (
        rule().replace("  because: seen\n", ""),
        "3:3: 'because' is missing in this rule",
    ),
    "a default without use": (
        "version: 1\nrules: []\ndefault:\n  because: x\n",
        "4:3: 'use' is missing in default",
    ),
    "a misspelled key, not called missing too": (
        rule().replace("rules:", "ruels:"),
        "2:1: unknown key 'ruels' (did you mean 'rules'?)",
    ),
    "an unknown key in a rule": (
        rule().replace("because", "becuase", 1),
        "6:3: unknown key 'becuase' in this rule (did you mean 'because'?)",
    ),
    "an unknown key in when": (
        rule(when="{gpu_arc: sm90}"),
        "4:10: unknown key 'gpu_arc' in when (did you mean 'gpu_arch'?)",
    ),
    "an unknown key in use": (
        rule(use="{bakend: hybrid}"),
        "5:9: unknown key 'bakend' in use (did you mean 'backend'?)",
    ),
    "an unknown key near nothing": (
        rule(use="{backend: hybrid, zzz: 1}"),
        "5:26: unknown key 'zzz' in use; valid: backend, fence_forward, options",
    ),
    "an unknown key in default": (
        "version: 1\nrules: []" + DEFAULT + "  becuse: x\n",
        "6:3: unknown key 'becuse' in default (did you mean 'because'?)",
    ),
    "when empty": (rule(when=""), "4:3: when must be a mapping; {} is an empty one"),
    "when a list": (rule(when="[gpu_arch]"), "4:9: when must be a mapping; {} is an empty one"),
    "use a word": (rule(use="hybrid"), "5:8: use must be a mapping"),
    "name empty": (rule(name="''"), "3:9: name must be a text that is not empty"),
    "name a number": (rule(name="3"), "3:9: name must be a text that is not empty"),
    "name default": (
        rule(name="default"),
        "3:9: 'default' is what answers when no rule matches; give the rule another name",
    ),
    "because blank": (rule().replace("seen", "' '"), "6:12: because must be a text that is not empty"),
    "because empty": (rule().replace(" seen", ""), "6:3: because must be a text that is not empty"),
    "an unknown attention backend": (
        rule(when="{attention_backend: [triton, fa33]}"),
        "4:38: unknown attention backend 'fa33' (did you mean 'fa3'?)",
    ),
    "an unknown decode backend": (
        rule(when="{decode_attention_backend: flashinfr}"),
        "4:36: unknown attention backend 'flashinfr' (did you mean 'flashinfer'?)",
    ),
    "an unknown architecture": (
        rule(when="{gpu_arch: sm_90}"),
        "4:20: unknown GPU architecture 'sm_90': written sm90, sm100, ... or cpu (did you mean 'sm90'?)",
    ),
    "an architecture in capitals": (
        rule(when="{gpu_arch: SM90}"),
        "4:20: unknown GPU architecture 'SM90': written sm90, sm100, ... or cpu (did you mean 'sm90'?)",
    ),
    "an architecture that is a number": (
        rule(when="{gpu_arch: [90]}"),
        "4:21: gpu_arch takes words such as sm90, not 90",
    ),
    "an unknown layout": (
        rule(when="{mem_layout: page_frist}"),
        "4:22: unknown memory layout 'page_frist' (did you mean 'page_first'?)",
    ),
    "an unknown KV kind": (
        rule(when="{kv_kind: gqa}"),
        "4:19: unknown KV kind 'gqa'; valid: mha, mla",
    ),
    "an unknown device": (
        rule(when="{device: cda}"),
        "4:18: unknown device 'cda' (did you mean 'cuda'?)",
    ),
    "a version without an operator": (
        rule(when="{sgl_kernel: '0.3.21'}"),
        "4:22: '0.3.21' is not a version specifier (PEP 440), such as '>=0.3,<0.5' "
        "(did you mean '==0.3.21'?)",
    ),
    "a version that is a number": (
        rule(when="{sgl_kernel: 0.4}"),
        '4:22: sgl_kernel takes words such as ">=0.3" in quotes, not 0.4',
    ),
    "an empty specifier": (
        rule(when="{sglang: ''}"),
        "4:18: an empty version specifier; leave the condition out to accept every version",
    ),
    "a page size that is a word": (
        rule(when="{page_size: small}"),
        "4:21: page_size: 'small' is neither a number nor a comparison such as <64 or >=16,<64",
    ),
    "a reversed comparison": (
        rule(when="{page_size: [1, =<64]}"),
        "4:25: page_size: '=<64' is neither a number nor a comparison such as <64 or >=16,<64 "
        "(did you mean '<=64'?)",
    ),
    "a page size that is true": (
        rule(when="{page_size: true}"),
        "4:21: page_size takes a number, or a comparison such as '<64', not true",
    ),
    "a condition without a value": (
        rule(when="{gpu_arch: }"),
        "4:10: gpu_arch is empty; leave it out, or give it a value",
    ),
    "an empty list": (
        rule(when="{gpu_arch: []}"),
        "4:20: gpu_arch is an empty list: this rule can never match",
    ),
    "an unknown backend": (
        rule(use="{backend: hibrid}"),
        "5:18: unknown backend 'hibrid' (did you mean 'hybrid'?)",
    ),
    "SGLang's own backend": (
        rule(use="{backend: direct}"),
        "5:18: 'direct' is SGLang's own io backend, which no rule can choose: it runs untouched, without "
        "this project's fences (--hicache-io-backend direct selects it); a rule chooses one of "
        "fenced_kernel, copy_engine, hybrid",
    ),
    "auto as a backend": (
        rule(use="{backend: auto}"),
        "5:18: 'auto' asks the policy, so no rule can choose it; valid: fenced_kernel, copy_engine, hybrid",
    ),
    "a list of backends": (
        rule(use="{backend: [hybrid]}"),
        "5:18: backend must be the name of a backend, such as hybrid, not a list",
    ),
    "no backend": (rule(use="{fence_forward: []}"), "5:8: 'backend' is missing in use"),
    "an unknown forward": (
        rule(use="{backend: hybrid, fence_forward: [extend, prefill]}"),
        "5:50: unknown forward 'prefill'; valid: extend, decode, uses (did you mean 'extend'?)",
    ),
    "fence_forward empty": (
        rule(use="{backend: hybrid, fence_forward: }"),
        "5:26: fence_forward is empty; write [] for no forward",
    ),
    "fence_forward true": (
        rule(use="{backend: hybrid, fence_forward: true}"),
        "5:41: fence_forward takes words such as extend, not true",
    ),
    "fenced_kernel without fences": (
        rule(use="{backend: fenced_kernel}"),
        "5:8: fenced_kernel needs an explicit fence_forward; [] means the producer fence only",
    ),
    "uses without an attention backend": (
        rule(use="{backend: hybrid, fence_forward: uses}"),
        "5:41: uses needs attention_backend in when",
    ),
    "uses in the default": (
        "version: 1\nrules: []" + DEFAULT.replace("[]", "uses"),
        "4:41: uses needs attention_backend in when, and default has no when",
    ),
    "an option of another backend": (
        rule(use="{backend: copy_engine, options: {staging_mb: 1}}"),
        "5:41: unknown option of copy_engine 'staging_mb'; valid: max_copies_per_batch",
    ),
    "a misspelled option": (
        rule(use="{backend: hybrid, options: {stagin_mb: 1}}"),
        "5:36: unknown option of hybrid 'stagin_mb' (did you mean 'staging_mb'?)",
    ),
    "an option that is zero": (
        rule(use="{backend: hybrid, options: {gather_ctas: 0}}"),
        "5:49: gather_ctas must be a whole number from 1 to 192, not 0",
    ),
    "an option that is a text": (
        rule(use="{backend: hybrid, options: {gather_ctas: '32'}}"),
        "5:49: gather_ctas must be a whole number from 1 to 192, not 32",
    ),
    "options a list": (
        rule(use="{backend: hybrid, options: [staging_mb]}"),
        "5:35: options must be a mapping, not a list",
    ),
    "a page size below every one": (
        rule(when="{gpu_arch: sm90, page_size: '<1'}"),
        "4:37: this rule can never match: no value satisfies page_size",
    ),
    "page sizes that exclude each other": (
        rule(when="{page_size: '>64,<=64'}"),
        "4:21: this rule can never match: no value satisfies page_size",
    ),
    "versions that exclude each other": (
        rule(when="{sglang: '>=2,<1'}"),
        "4:18: this rule can never match: no value satisfies sglang",
    ),
    "attention backends that exclude each other": (
        rule(
            when="{attention_backend: fa3, prefill_attention_backend: triton, decode_attention_backend: fa4, "
            "speculative: none}"
        ),
        "4:29: this rule can never match: neither prefill_attention_backend nor decode_attention_backend "
        "allows a backend of attention_backend",
    ),
    "a GPU on the CPU": (
        rule(when="{gpu_arch: [sm90, sm100], device: cpu}"),
        "4:43: this rule can never match: no gpu_arch that it lists is on such a device",
    ),
    "attention backends that exclude each other, drafts included": (
        rule(
            when="{attention_backend: fa3, prefill_attention_backend: triton, decode_attention_backend: fa4, "
            "verify_attention_backend: fa4, draft_attention_backend: triton}"
        ),
        "4:29: this rule can never match: neither prefill_attention_backend, decode_attention_backend, "
        "verify_attention_backend nor draft_attention_backend allows a backend of attention_backend",
    ),
    "a GPU as device": (rule(when="{device: [gpu]}"), "4:19: unknown device 'gpu' (did you mean 'cuda'?)"),
    "a write policy misspelled": (
        rule(when="{write_policy: write_thru}"),
        "4:24: unknown write policy 'write_thru' (did you mean 'write_through'?)",
    ),
    "a speculative algorithm misspelled": (
        rule(when="{speculative: EAGEL}"),
        "4:23: unknown speculative algorithm 'EAGEL' (did you mean 'EAGLE'?)",
    ),
    "an FA3 build misspelled": (
        rule(when="{fa3_binary: sglkernel}"),
        "4:22: unknown FA3 build 'sglkernel' (did you mean 'sgl_kernel'?)",
    ),
    "a driver that is a number": (
        rule(when="{driver: 580}"),
        '4:18: driver takes words such as ">=0.3" in quotes, not 580',
    ),
    "a number of ranks below every one": (
        rule(when="{tp: '<1'}"),
        "4:14: this rule can never match: no value satisfies tp",
    ),
    "row bytes that are a word": (
        rule(when="{row_bytes: big}"),
        "4:21: row_bytes: 'big' is neither a number nor a comparison such as <64 or >=16,<64",
    ),
    "a flag that is a word": (
        rule(when="{overlap: 'on'}"),
        "4:19: overlap takes true or false, not on (did you mean 'true'?)",
    ),
    "a flag that is a number": (
        rule(when="{write_contiguous: 1}"),
        "4:28: write_contiguous takes true or false, not 1",
    ),
    "a GPU without a name": (
        rule(when="{gpu_name: ''}"),
        "4:20: gpu_name is empty; leave it out, or give it a value",
    ),
    "a write condition misspelled": (
        rule(when="{write_entry_byte: 1}"),
        "4:10: unknown key 'write_entry_byte' in when (did you mean 'write_entry_bytes'?)",
    ),
    "entries that exclude each other": (
        rule(when="{write_entries: '>5,<3'}"),
        "4:25: this rule can never match: no value satisfies write_entries",
    ),
    "unknown that is no match": (
        rule().replace("  use:", "  unknown: matches\n  use:", 1),
        "5:12: unknown takes match, or a list of conditions such as [gpu_arch], not 'matches' "
        "(did you mean 'match'?)",
    ),
    "unknown without brackets": (
        rule().replace("  use:", "  unknown: gpu_arch\n  use:", 1),
        "5:12: unknown takes match, or a list of conditions such as [gpu_arch], not 'gpu_arch' "
        "(did you mean '[gpu_arch]'?)",
    ),
    "unknown empty": (
        rule().replace("  use:", "  unknown: []\n  use:", 1),
        "5:12: unknown is an empty list; leave it out: an unknown fact then matches nothing",
    ),
    "unknown of a condition that the rule has not": (
        rule().replace("  use:", "  unknown: [gpu_name]\n  use:", 1),
        "5:12: unknown names 'gpu_name', but when has no condition on such a fact of the server "
        "(did you mean 'gpu_arch'?)",
    ),
    "unknown of a write": (
        rule(when="{write_tokens: 5, gpu_arch: sm90}").replace(
            "  use:", "  unknown: [write_tokens]\n  use:", 1
        ),
        "5:12: unknown names 'write_tokens', but when has no condition on such a fact of the server",
    ),
    "unknown without a condition": (
        rule(when="{write_tokens: 5}").replace("  use:", "  unknown: match\n  use:", 1),
        "5:12: unknown says nothing here: when has no condition on the server",
    ),
    "unmeasured that is no path": (
        rule().replace("  use:", "  unmeasured: {when.page_size: all}\n  use:", 1),
        "5:16: unmeasured names 'when.page_size', which the rule does not have",
    ),
    "unmeasured a list": (
        rule().replace("  use:", "  unmeasured: [when.gpu_arch]\n  use:", 1),
        "5:15: unmeasured must be a mapping such as {when.page_size: pages of 2 to 15}, not a list",
    ),
    "unmeasured without words": (
        rule().replace("  use:", "  unmeasured: {when.gpu_arch: }\n  use:", 1),
        "5:16: unmeasured says in words what nobody measured",
    ),
    "extends nothing": (
        rule().replace("rules:", "extends:\nrules:", 1),
        "2:1: extends takes default, or the name of a policy file, not nothing",
    ),
    "more CTAs than any GPU has SMs": (
        rule(use="{backend: hybrid, options: {gather_ctas: 193}}"),
        "5:49: gather_ctas must be at most 192, not 193: no GPU has more SMs (a full GB202 has 192, a B200 "
        "148, an H200 132)",
    ),
    "more staging than any GPU has memory": (
        rule(use="{backend: hybrid, options: {staging_mb: 1000000}}"),
        "5:48: staging_mb must be at most 294,912, not 1,000,000: no GPU has more memory (a B300 has 288 GB)",
    ),
    "a negative staging": (
        rule(use="{backend: hybrid, options: {staging_mb: -1}}"),
        "5:48: staging_mb must be a whole number from 1 to 294,912 or auto, not -1",
    ),
    "a batch that crashed": (
        rule(use="{backend: copy_engine, options: {max_copies_per_batch: 51828}}"),
        "5:63: max_copies_per_batch must be at most 51,827, not 51,828: a batch call of 51,828 copies "
        "crashed (vLLM #49276)",
    ),
    "more blocks than run at once": (
        rule(use="{backend: fenced_kernel, fence_forward: [], options: {block_quota: 10000}}"),
        "5:75: block_quota must be at most 6,144, not 10,000: no GPU runs more thread blocks at once "
        "(192 SMs of 32 blocks)",
    ),
}
