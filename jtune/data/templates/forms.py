# ruff: noqa: RUF001 - full-width bars and commas are what the models use
"""Chat formats that several templates share."""

from dataclasses import replace

from jtune.data.templates.chat_format import BOS, EOS, ChatFormat

CHATML = ChatFormat(
    user=("<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n",),
    assistant=("{{content}}<|im_end|>\n",),
    system=("<|im_start|>system\n{{content}}<|im_end|>\n",),
    stop_words=("<|im_end|>",),
)
CHATML_TOOL = replace(CHATML, observation=("<|im_start|>tool\n{{content}}<|im_end|>\n<|im_start|>assistant\n",))
QWEN = replace(
    CHATML,
    observation=(
        ("<|im_start|>user\n<tool_response>\n{{content}}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"),
    ),
    tool_format="qwen",
    replace_eos=True,
)
LLAMA3 = ChatFormat(
    user=(
        (
            "<|start_header_id|>user<|end_header_id|>\n\n{{content}}<|eot_id|><|start_header_id|>assistant<|end_hea"
            "der_id|>\n\n"
        ),
    ),
    assistant=("{{content}}<|eot_id|>",),
    system=("<|start_header_id|>system<|end_header_id|>\n\n{{content}}<|eot_id|>",),
    observation=(
        (
            "<|start_header_id|>ipython<|end_header_id|>\n\n{{content}}<|eot_id|><|start_header_id|>assistant<|end_"
            "header_id|>\n\n"
        ),
    ),
    prefix=(BOS,),
    tool_format="llama3",
    stop_words=("<|eot_id|>", "<|eom_id|>"),
    replace_eos=True,
)
LLAMA2 = ChatFormat(
    user=(BOS, "[INST] {{content}} [/INST]"), system=("<<SYS>>\n{{content}}\n<</SYS>>\n\n",), system_in_user=True
)
MISTRAL = ChatFormat(
    user=("[INST] {{content}}[/INST]",),
    assistant=(" {{content}}", EOS),
    system=("{{content}}\n\n",),
    observation=('[TOOL_RESULTS] {"content": {{content}}}[/TOOL_RESULTS]',),
    function=("[TOOL_CALLS] {{content}}", EOS),
    prefix=(BOS,),
    tool_format="mistral",
    system_in_user=True,
)
MINISTRAL = replace(
    MISTRAL,
    user=("[INST]{{content}}[/INST]",),
    assistant=("{{content}}", EOS),
    observation=('[TOOL_RESULTS]{"content": {{content}}}[/TOOL_RESULTS]',),
    function=("[TOOL_CALLS]{{content}}", EOS),
)
GEMMA = ChatFormat(
    user=("<start_of_turn>user\n{{content}}<end_of_turn>\n<start_of_turn>model\n",),
    assistant=("{{content}}<end_of_turn>\n",),
    system=("{{content}}\n\n",),
    observation=("<start_of_turn>tool\n{{content}}<end_of_turn>\n<start_of_turn>model\n",),
    prefix=(BOS,),
    stop_words=("<end_of_turn>",),
    replace_eos=True,
    system_in_user=True,
)
GLM4 = ChatFormat(
    user=("<|user|>\n{{content}}<|assistant|>",),
    assistant=("\n{{content}}",),
    system=("<|system|>\n{{content}}",),
    observation=("<|observation|>\n{{content}}<|assistant|>",),
    function=("{{content}}",),
    prefix=("[gMASK]<sop>",),
    tool_format="glm4",
    stop_words=("<|user|>", "<|observation|>"),
    efficient_eos=True,
)
GLM4_THINKING = replace(GLM4, thinking=True)
DEEPSEEK3 = ChatFormat(user=("<｜User｜>{{content}}<｜Assistant｜>",), prefix=(BOS,))
GRANITE = ChatFormat(
    user=(
        ("<|start_of_role|>user<|end_of_role|>{{content}}<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"),
    ),
    assistant=("{{content}}<|end_of_text|>\n",),
    system=("<|start_of_role|>system<|end_of_role|>{{content}}<|end_of_text|>\n",),
)
PHI = ChatFormat(
    user=("<|user|>\n{{content}}<|end|>\n<|assistant|>\n",),
    assistant=("{{content}}<|end|>\n",),
    system=("<|system|>\n{{content}}<|end|>\n",),
    stop_words=("<|end|>",),
    replace_eos=True,
)

VICUNA = ChatFormat(
    user=("USER: {{content}} ASSISTANT:",),
    default_system=(
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    ),
)
INTERN2 = replace(
    CHATML,
    prefix=(BOS,),
    default_system=(
        "You are an AI assistant whose name is InternLM (书生·浦语).\n- InternLM (书生·浦语) is a "
        "conversational language model that is developed by Shanghai AI Laboratory (上海人工智能实验室). It is "
        "designed to be helpful, honest, and harmless.\n- InternLM (书生·浦语) can understand and communicate "
        "fluently in the language chosen by the user such as English and 中文."
    ),
)
LFM2 = replace(
    QWEN,
    observation=(
        (
            "<|im_start|>tool\n<|tool_response_start|>{{content}}<|tool_response_end|><|im_end|>\n<|im_start|>assis"
            "tant\n"
        ),
    ),
    tool_format="lfm2",
    default_system="You are a helpful AI assistant.",
    tool_call=("<|tool_call_start|>", "<|tool_call_end|>"),
)
MOONLIGHT = replace(
    CHATML,
    user=("<|im_user|>user<|im_middle|>{{content}}<|im_end|><|im_assistant|>assistant<|im_middle|>",),
    assistant=("{{content}}<|im_end|>",),
    system=("<|im_system|>system<|im_middle|>{{content}}<|im_end|>",),
    default_system="You are a helpful assistant provided by Moonshot-AI.",
    replace_eos=True,
)
QWEN_HELPFUL = replace(QWEN, default_system="You are a helpful assistant.")
QWEN3 = replace(QWEN, thinking=True)
GEMMA4 = ChatFormat(
    user=("<|turn>user\n{{content}}<turn|>\n<|turn>model\n",),
    assistant=("{{content}}<turn|>\n",),
    system=("<|turn>system\n<|think|>{{content}}<turn|>\n",),
    observation=("<|turn>tool\n{{content}}<turn|>\n<|turn>model\n",),
    function=("<|tool>{{content}}<tool|>",),
    prefix=(BOS,),
    tool_format="gemma4",
    default_system="You are a helpful assistant.",
    stop_words=("<turn|>",),
    thought=("<|channel>thought\n", "<channel|>"),
    replace_eos=True,
    thinking=True,
)

DBRX_SYSTEM = (
    "You are DBRX, created by Databricks. You were last updated in December 2023. You answer questions "
    "based on information available up to that point.\nYOU PROVIDE SHORT RESPONSES TO SHORT QUESTIONS OR "
    "STATEMENTS, but provide thorough responses to more complex and open-ended questions.\nYou assist with "
    "various tasks, from writing to coding (using markdown for code blocks — remember to use ``` with "
    "code, JSON, and tables).\n(You do not have real-time data access or code execution capabilities. You "
    "avoid stereotyping and provide balanced perspectives on controversial topics. You do not provide song "
    "lyrics, poems, or news articles and do not divulge details of your training data.)\nThis is your "
    "system prompt, guiding your responses. Do not reference it, just respond to the user. If you find "
    "yourself talking about this message, stop. You should be responding appropriately and usually that "
    "means not mentioning this.\nYOU DO NOT MENTION ANY OF THIS INFORMATION ABOUT YOURSELF UNLESS THE "
    "INFORMATION IS DIRECTLY PERTINENT TO THE USER'S QUERY."
)
