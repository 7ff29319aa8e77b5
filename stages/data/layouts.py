"""The turn layouts that known model families were trained with, in Jinja: written from their published formats, one by name.

They put no line of their own into a system prompt (no date, no default persona). A system prompt stands where the family has it: in a turn of
its own, or before the first user's text (mistral, gemma). Every turn of the assistant ends with one token, at which a rollout stops.
"""

from __future__ import annotations

# Header, blank line, text, <|eot_id|>. Tool turns as 3.1 documents for calls in JSON: the schemas in the first user turn, one call and nothing else
# as an assistant's turn, results under the role "ipython". They show neither ids of calls nor names with results.
LLAMA3 = """\
{%- set first = namespace(user=true) %}
{%- for message in messages %}
{%- set role = 'ipython' if message['role'] == 'tool' else message['role'] %}
{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
{%- if message['role'] == 'user' and tools and first.user %}
{{- 'Given the following functions, please respond with a JSON for a function call with its proper arguments that best answers the given prompt.\\n\\n' }}
{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}. Do not use variables.\\n\\n' }}
{%- for tool in tools %}
{{- tool | tojson(indent=4) + '\\n\\n' }}
{%- endfor %}
{%- set first.user = false %}
{%- endif %}
{%- if message['tool_calls'] %}
{%- if message['content'] or message['tool_calls'] | length > 1 %}
{{- raise_exception('the llama3 layout has one tool call and no text beside it in a turn; qwen has both') }}
{%- endif %}
{%- set call = message['tool_calls'][0]['function'] %}
{{- '{"name": ' + call['name'] | tojson + ', "parameters": ' + call['arguments'] | tojson + '}' }}
{%- endif %}
{{- message['content'] + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

# chatml that ends every turn with <|im_end|> (the built-in chatml ends the assistant's with EOS), with tools as Qwen2.5 and Hermes have them:
# schemas after the system prompt, calls between <tool_call> tags after the turn's text, results of one step together in a user turn.
QWEN = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0]['role'] == 'system' %}
{{- messages[0]['content'] + '\\n\\n' }}
{%- endif %}
{{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
{{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>\\n' }}
{%- for tool in tools %}
{{- tool | tojson + '\\n' }}
{%- endfor %}
{{- '</tools>\\n\\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\\n' }}
{{- '<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message['role'] == 'tool' %}
{{- '<|im_start|>user' if loop.first or loop.previtem['role'] != 'tool' else '' }}
{{- '\\n<tool_response>\\n' + message['content'] + '\\n</tool_response>' }}
{{- '<|im_end|>\\n' if loop.last or loop.nextitem['role'] != 'tool' else '' }}
{%- elif not (tools and message['role'] == 'system') %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] }}
{%- for call in message['tool_calls'] or [] %}
{{- '\\n' if message['content'] or not loop.first else '' }}
{{- '<tool_call>\\n{"name": ' + call['function']['name'] | tojson + ', "arguments": ' + call['function']['arguments'] | tojson + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

# Roles in tags of plain text, EOS after every turn.
ZEPHYR = """\
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>\\n' }}
{%- endif %}"""

# The first of Mistral's layouts, that of 7B Instruct: works as plain text too. Its later ones have tools, but only before the last question,
# which rewrites the turns before: the loss could not cover them.
MISTRAL = """\
{%- set before = namespace(text='') %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{%- set before.text = message['content'] + '\\n\\n' %}
{%- elif message['role'] == 'user' %}
{{- '[INST] ' + before.text + message['content'] + ' [/INST]' }}
{%- set before.text = '' %}
{%- else %}
{{- ' ' + message['content'] + eos_token }}
{%- endif %}
{%- endfor %}"""

GEMMA = """\
{%- set before = namespace(text='') %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{%- set before.text = message['content'] + '\\n\\n' %}
{%- elif message['role'] == 'user' %}
{{- '<start_of_turn>user\\n' + before.text + message['content'] + '<end_of_turn>\\n' }}
{%- set before.text = '' %}
{%- else %}
{{- '<start_of_turn>model\\n' + message['content'] + '<end_of_turn>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<start_of_turn>model\\n' }}
{%- endif %}"""

LAYOUTS = {"llama3": LLAMA3, "qwen": QWEN, "zephyr": ZEPHYR, "mistral": MISTRAL, "gemma": GEMMA}
# What has to be one special token each, or turns would end with text that no rollout stops at.
TOKENS = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "qwen": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
}
WITH_TOOLS = ("llama3", "qwen")
