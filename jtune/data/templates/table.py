# ruff: noqa: RUF001 - full-width bars and commas are what the models use
"""The chat formats, by LLaMA-Factory's names: what stands around messages, which words end an answer.

Slots, words and default system messages are facts about the models, checked token by token against LLaMA-Factory 0.9.5.
Formats that differ from another in a few places say only these. For a format of your own, add a line.
"""

from dataclasses import replace

from jtune.data.templates.chat_format import BOS, EOS, ChatFormat, Token
from jtune.data.templates.forms import (
    CHATML,
    CHATML_TOOL,
    DBRX_SYSTEM,
    DEEPSEEK3,
    GEMMA,
    GEMMA4,
    GLM4,
    GLM4_THINKING,
    GRANITE,
    INTERN2,
    LFM2,
    LLAMA2,
    LLAMA3,
    MINISTRAL,
    MISTRAL,
    MOONLIGHT,
    PHI,
    QWEN,
    QWEN3,
    QWEN_HELPFUL,
    VICUNA,
)
from jtune.data.templates.older import OLDER

TABLE = {
    "aeva": replace(
        GLM4_THINKING,
        tool_format="glm4_moe",
        default_system=(
            "You are an AI assistant named Aeva created by Zongzhi Lou. Your answer should be friendly, unbiased, "
            "faithful, informative and detailed."
        ),
        thought=("<think>", "</think>"),
        empty_thought="</think>",
    ),
    "alpaca": ChatFormat(
        user=("### Instruction:\n{{content}}\n\n### Response:\n",),
        assistant=("{{content}}", EOS, "\n\n"),
        default_system=(
            "Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n"
        ),
    ),
    "bailing": ChatFormat(
        user=("<role>HUMAN</role>{{content}}<role>ASSISTANT</role>",),
        assistant=("{{content}}",),
        system=("<role>SYSTEM</role>{{content}}",),
        observation=("<role>OBSERVATION</role>{{content}}<role>ASSISTANT</role>",),
        stop_words=("<|endoftext|>",),
        efficient_eos=True,
    ),
    "bailing_v2": ChatFormat(
        user=("<role>HUMAN</role>{{content}}<|role_end|><role>ASSISTANT</role>",),
        assistant=("{{content}}<|role_end|>",),
        system=("<role>SYSTEM</role>{{content}}<|role_end|>",),
        observation=(
            (
                "<role>OBSERVATION</role>\n<tool_response>\n{{content}}\n</tool_response><|role_end|><role>ASSISTANT</r"
                "ole>"
            ),
        ),
        tool_format="ling",
        stop_words=("<|endoftext|>",),
        efficient_eos=True,
    ),
    "breeze": replace(DEEPSEEK3, user=("[INST] {{content}} [/INST] ",), assistant=("{{content}}",), efficient_eos=True),
    "chatglm3": replace(
        GLM4,
        user=(Token("<|user|>"), "\n", "{{content}}", Token("<|assistant|>")),
        assistant=("\n", "{{content}}"),
        system=(Token("<|system|>"), "\n", "{{content}}"),
        observation=(Token("<|observation|>"), "\n", "{{content}}", Token("<|assistant|>")),
        prefix=(Token("[gMASK]"), Token("sop")),
    ),
    "chatml": replace(CHATML_TOOL, stop_words=("<|im_end|>", "<|im_start|>"), replace_eos=True),
    "chatml_de": replace(
        CHATML_TOOL,
        default_system="Du bist ein freundlicher und hilfsbereiter KI-Assistent.",
        stop_words=("<|im_end|>", "<|im_start|>"),
        replace_eos=True,
    ),
    "cohere": replace(
        DEEPSEEK3,
        user=(
            (
                "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{{content}}<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_"
                "TOKEN|>"
            ),
        ),
        system=("<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{{content}}<|END_OF_TURN_TOKEN|>",),
    ),
    "cpm4": replace(CHATML_TOOL, prefix=(BOS,)),
    "dbrx": replace(
        CHATML_TOOL,
        default_system=DBRX_SYSTEM,
        replace_eos=True,
    ),
    "deepseek": replace(DEEPSEEK3, user=("User: {{content}}\n\nAssistant:",), system=("{{content}}\n\n",)),
    "deepseek3": DEEPSEEK3,
    "deepseekcoder": replace(
        DEEPSEEK3,
        user=("### Instruction:\n{{content}}\n### Response:",),
        assistant=("\n{{content}}\n<|EOT|>\n",),
        default_system=(
            "You are an AI programming assistant, utilizing the DeepSeek Coder model, developed by DeepSeek "
            "Company, and you only answer questions related to computer science. For politically sensitive "
            "questions, security and privacy issues, and other non-computer science questions, you will refuse to "
            "answer.\n"
        ),
    ),
    "deepseekr1": replace(DEEPSEEK3, thinking=True),
    "default": ChatFormat(
        user=("Human: {{content}}", EOS, "\nAssistant:"),
        assistant=("{{content}}", EOS, "\n"),
        system=("System: {{content}}", EOS, "\n"),
    ),
    "empty": ChatFormat(assistant=("{{content}}",)),
    "ernie": replace(
        CHATML,
        user=("<|im_start|>user\n{{content}}<|im_end|>\n\n<|im_start|>assistant\n",),
        assistant=("{{content}}<|im_end|>\n\n",),
        system=("<|im_start|>system\n{{content}}<|im_end|>\n\n",),
        observation=("<|im_start|>tool\n{{content}}<|im_end|>\n\n<|im_start|>assistant\n",),
        default_system="<global_setting>\nthink_mode=True\n</global_setting>",
    ),
    "ernie_nothink": ChatFormat(
        user=("User: {{content}}\nAssistant: ",),
        assistant=("{{content}}<|end_of_sentence|>",),
        system=("{{content}}\n",),
        prefix=("<|begin_of_sentence|>",),
        stop_words=("<|end_of_sentence|>",),
    ),
    "exaone": ChatFormat(
        user=("[|user|]{{content}}\n[|assistant|]",),
        assistant=("{{content}}", EOS, "\n"),
        system=("[|system|]{{content}}[|endofturn|]\n",),
    ),
    "falcon": ChatFormat(user=("User: {{content}}\nFalcon:",), assistant=("{{content}}\n",), efficient_eos=True),
    "falcon_h1": replace(CHATML_TOOL, prefix=(BOS,), stop_words=("<|im_end|>", "<|end_of_text|>")),
    "fewshot": ChatFormat(assistant=("{{content}}\n\n",), efficient_eos=True),
    "gemma": GEMMA,
    "gemma2": replace(GEMMA, stop_words=("<eos>", "<end_of_turn>"), efficient_eos=True, replace_eos=False),
    "gemma3": GEMMA,
    "gemma3n": GEMMA,
    "glm4": GLM4,
    "glm4_7": replace(GLM4_THINKING, tool_format="glm4_moe", thought=("<think>", "</think>"), empty_thought="</think>"),
    "glm4_moe": replace(GLM4_THINKING, tool_format="glm4_moe"),
    "glmz1": GLM4_THINKING,
    "gpt_oss": ChatFormat(
        user=("<|start|>user<|message|>{{content}}<|end|><|start|>assistant",),
        assistant=("{{content}}",),
        system=("<|start|>system<|message|>{{content}}<|end|>",),
        default_system="You are ChatGPT, a large language model trained by OpenAI.",
        thought=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
        efficient_eos=True,
        thinking=True,
    ),
    "granite3": GRANITE,
    "granite4": replace(
        GRANITE,
        observation=("<|start_of_role|>tool<|end_of_role|>{{content}}<|end_of_text|>\n<|start_of_role|>assistant\n",),
        default_system="You are Granite, developed by IBM. You are a helpful AI assistant.",
        stop_words=("<|end_of_text|>",),
    ),
    "hunyuan": ChatFormat(
        user=("{{content}}<|extra_0|>",),
        assistant=("{{content}}<|eos|>",),
        system=("{{content}}<|extra_4|>",),
        prefix=("<|startoftext|>",),
        stop_words=("<|eos|>",),
    ),
    "hunyuan_small": ChatFormat(
        user=("<｜hy_User｜>{{content}}<｜hy_place▁holder▁no▁8｜>",),
        assistant=("{{content}}<｜hy_place▁holder▁no▁2｜>",),
        system=("{{content}}<｜hy_place▁holder▁no▁3｜>",),
        prefix=("<｜hy_begin▁of▁sentence｜>",),
        stop_words=("<｜hy_place▁holder▁no▁2｜>",),
    ),
    "hy3": replace(
        DEEPSEEK3,
        user=("<｜hy_User｜>{{content}}<｜hy_Assistant｜>",),
        assistant=("{{content}}<｜hy_eos｜>",),
        stop_words=("<｜hy_eos｜>",),
        thought=("<think>", "</think>"),
        replace_eos=True,
        thinking=True,
    ),
    "index": ChatFormat(
        user=("reserved_0{{content}}reserved_1",),
        assistant=("{{content}}",),
        system=("<unk>{{content}}",),
        efficient_eos=True,
    ),
    "intern2": INTERN2,
    "lfm2": LFM2,
    "llama2": LLAMA2,
    "llama2_zh": replace(LLAMA2, default_system="You are a helpful assistant. 你是一个乐于助人的助手。"),
    "llama3": LLAMA3,
    "mimo": replace(QWEN_HELPFUL, thinking=True),
    "mimo_v2": replace(
        QWEN,
        default_system="You are MiMo, a helpful AI assistant engineered by Xiaomi.",
        thought=("<think>", "</think>"),
        thinking=True,
    ),
    "minimax1": ChatFormat(
        user=(
            (
                "<beginning_of_sentence>user name=user\n{{content}}<end_of_sentence>\n<beginning_of_sentence>ai "
                "name=assistant\n"
            ),
        ),
        assistant=("{{content}}<end_of_sentence>\n",),
        system=("<beginning_of_sentence>system ai_setting=assistant\n{{content}}<end_of_sentence>\n",),
        observation=(
            (
                "<beginning_of_sentence>tool name=tools\n{{content}}<end_of_sentence>\n<beginning_of_sentence>ai "
                "name=assistant\n"
            ),
        ),
        tool_format="minimax1",
        default_system="You are a helpful assistant.",
        stop_words=("<end_of_sentence>",),
    ),
    "minimax2": ChatFormat(
        user=("]~b]user\n{{content}}[e~[\n]~b]ai\n",),
        assistant=("{{content}}[e~[\n",),
        system=("]~!b[]~b]system\n{{content}}[e~[\n",),
        observation=("]~b]tool\n<response>{{content}}</response>[e~[\n]~b]ai\n",),
        tool_format="minimax2",
        default_system="You are a helpful assistant. Your name is MiniMax-M2.1 and is built by MiniMax.",
        stop_words=("[e~[",),
        thinking=True,
    ),
    "ministral": MINISTRAL,
    "ministral3": MINISTRAL,
    "mistral": MISTRAL,
    "mistral_small": replace(MINISTRAL, system=("[SYSTEM_PROMPT]{{content}}[/SYSTEM_PROMPT]",), system_in_user=False),
    "moonlight": MOONLIGHT,
    "olmo": ChatFormat(user=("<|user|>\n{{content}}<|assistant|>\n",), prefix=(EOS,)),
    "openchat": replace(DEEPSEEK3, user=("GPT4 Correct User: {{content}}", EOS, "GPT4 Correct Assistant:")),
    "openchat-3.6": replace(
        DEEPSEEK3,
        user=(
            (
                "<|start_header_id|>GPT4 Correct User<|end_header_id|>\n\n{{content}}<|eot_id|><|start_header_id|>GPT4 "
                "Correct Assistant<|end_header_id|>\n\n"
            ),
        ),
        stop_words=("<|eot_id|>",),
    ),
    "opencoder": replace(CHATML_TOOL, default_system="You are OpenCoder, created by OpenCoder Team."),
    "phi": PHI,
    "phi4": replace(
        CHATML,
        user=("<|im_start|>user<|im_sep|>{{content}}<|im_end|><|im_start|>assistant<|im_sep|>",),
        assistant=("{{content}}<|im_end|>",),
        system=("<|im_start|>system<|im_sep|>{{content}}<|im_end|>",),
        replace_eos=True,
    ),
    "phi4_mini": replace(
        PHI,
        user=("<|user|>{{content}}<|end|><|assistant|>",),
        assistant=("{{content}}<|end|>",),
        system=("<|system|>{{content}}<|end|>",),
        tool_format="phi4_mini",
    ),
    "phi_small": PHI,
    "qwen": replace(QWEN, default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen3": QWEN3,
    "qwen3_5": replace(QWEN, tool_format="qwen3_5", thinking=True),
    "qwen3_5_nothink": replace(QWEN, tool_format="qwen3_5"),
    "qwen3_6": replace(QWEN, tool_format="qwen3_5", thinking=True),
    "qwen3_nothink": QWEN,
    "sailor": replace(
        CHATML,
        user=("<|im_start|>question\n{{content}}<|im_end|>\n<|im_start|>answer\n",),
        default_system=(
            "You are an AI assistant named Sailor created by Sea AI Lab. Your answer should be friendly, unbiased, "
            "faithful, informative and detailed."
        ),
    ),
    "seed_coder": ChatFormat(
        user=(BOS, "user\n{{content}}", EOS, BOS, "assistant\n"),
        system=(BOS, "system\n{{content}}", EOS),
        default_system=(
            "You are an AI programming assistant, utilizing the Seed-Coder model, developed by ByteDance Seed, and "
            "you only answer questions related to computer science. For politically sensitive questions, security "
            "and privacy issues, and other non-computer science questions, you will refuse to answer.\n\n"
        ),
    ),
    "seed_oss": ChatFormat(
        user=(BOS, "user\n{{content}}", EOS, BOS, "assistant\n"),
        system=(BOS, "system\n{{content}}", EOS),
        function=(BOS, "\n{{content}}", EOS),
        tool_format="seed_oss",
        thought=("<seed:think>", "</seed:think>"),
        thinking=True,
    ),
    "smollm": CHATML,
    "smollm2": replace(CHATML, default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face."),
    "solar": ChatFormat(
        user=("### User:\n{{content}}\n\n### Assistant:\n",),
        assistant=("{{content}}",),
        system=("### System:\n{{content}}\n\n",),
        efficient_eos=True,
    ),
    "starchat": replace(PHI, user=("<|user|>\n{{content}}<|end|>\n<|assistant|>",), replace_eos=False),
    "telechat2": ChatFormat(
        user=("<_user>{{content}}<_bot>",),
        system=("<_system>{{content}}",),
        default_system="你是中国电信星辰语义大模型，英文名是TeleChat，你是由中电信人工智能科技有限公司和中国电信人工智能研究院（TeleAI）研发的人工智能助手。",
    ),
    "vicuna": VICUNA,
    "xuanyuan": ChatFormat(
        user=("Human: {{content}} Assistant:",),
        default_system=(
            "以下是用户和人工智能助手之间的对话。用户以Human开头，人工智能助手以Assistant开头，会对人类提出的问题给"
            "出有帮助、高质量、详细和礼貌的回答，并且总是拒绝参与与不道德、不安全、有争议、政治敏感等相关的话题、问"
            "题和指示。\n"
        ),
    ),
    "yi": CHATML,
    "youtu": replace(
        DEEPSEEK3,
        user=("<|User|>{{content}}<|Assistant|>",),
        assistant=("{{content}}<|end_of_text|>",),
        observation=("<tool_response>\n{{content}}\n</tool_response><|Assistant|>",),
        function=("{{content}}",),
        stop_words=("<|end_of_text|>",),
        replace_eos=True,
        thinking=True,
    ),
    "yuan": ChatFormat(user=("{{content}}", Token("<sep>")), assistant=("{{content}}<eod>\n",), stop_words=("<eod>",)),
    "zephyr": ChatFormat(
        user=("<|user|>\n{{content}}", EOS, "<|assistant|>\n"),
        system=("<|system|>\n{{content}}", EOS),
        default_system="You are Zephyr, a helpful assistant.",
    ),
    # Of models that also see or hear: what these are given as text.
    "dots_ocr": ChatFormat(
        user=("<|user|>{{content}}<|endofuser|><|assistant|>",),
        assistant=("{{content}}<|endofassistant|>",),
        system=("<|system|>{{content}}<|endofsystem|>\n",),
        stop_words=("<|endofassistant|>",),
        efficient_eos=True,
    ),
    "ernie_vl": ChatFormat(
        user=("User: {{content}}",),
        assistant=("\nAssistant: {{content}}<|end_of_sentence|>",),
        system=("{{content}}\n",),
        stop_words=("<|end_of_sentence|>",),
        replace_eos=True,
        thinking=True,
    ),
    "gemma4": GEMMA4,
    "gemma4n": GEMMA4,
    "glm4_5v": replace(GLM4_THINKING, tool_format="glm4_moe", stop_words=(*GLM4.stop_words, "</answer>")),
    "glm4v": replace(GLM4_THINKING, stop_words=(*GLM4.stop_words, "</answer>")),
    "glm_ocr": GLM4,
    "granite3_vision": replace(
        VICUNA, user=("<|user|>\n{{content}}\n<|assistant|>\n",), system=("<|system|>\n{{content}}\n",)
    ),
    "intern_s1": replace(INTERN2, default_system=""),
    "intern_vl": replace(
        INTERN2,
        default_system=(
            "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
        ),
    ),
    "keye_vl": QWEN3,
    "kimi_vl": replace(
        MOONLIGHT,
        default_system="You are a helpful assistant",
        thought=("◁think▷", "◁/think▷"),
        replace_eos=False,
        thinking=True,
    ),
    "lfm2_vl": replace(LFM2, default_system="You are a helpful multimodal assistant by Liquid AI."),
    "llama4": replace(
        LLAMA3,
        user=("<|header_start|>user<|header_end|>\n\n{{content}}<|eot|><|header_start|>assistant<|header_end|>\n\n",),
        assistant=("{{content}}<|eot|>",),
        system=("<|header_start|>system<|header_end|>\n\n{{content}}<|eot|>",),
        observation=(
            "<|header_start|>ipython<|header_end|>\n\n{{content}}<|eot|><|header_start|>assistant<|header_end|>\n\n",
        ),
        stop_words=("<|eot|>", "<|eom|>"),
    ),
    "llava": VICUNA,
    "llava_next": VICUNA,
    "llava_next_llama3": LLAMA3,
    "llava_next_mistral": MISTRAL,
    "llava_next_qwen": QWEN_HELPFUL,
    "llava_next_video": VICUNA,
    "llava_next_video_mistral": MISTRAL,
    "llava_next_video_yi": CHATML,
    "llava_next_yi": CHATML,
    "mimo_vl": replace(QWEN3, default_system="You are MiMo, an AI assistant developed by Xiaomi."),
    "minicpm_o": replace(
        CHATML,
        default_system=("You are a helpful assistant. You can accept audio and text input and output voice and text."),
    ),
    "minicpm_v": replace(CHATML, default_system="You are a helpful assistant."),
    "minicpm_v_4_6": replace(CHATML, default_system="You are a helpful assistant."),
    "mllama": LLAMA3,
    "paligemma": replace(DEEPSEEK3, user=("{{content}}\n",), system_in_user=True),
    "paligemma_chat": replace(GEMMA, system=("{{content}}",)),
    "pixtral": MINISTRAL,
    "qwen2_audio": replace(CHATML, default_system="You are a helpful assistant.", replace_eos=True),
    "qwen2_omni": QWEN_HELPFUL,
    "qwen2_vl": QWEN_HELPFUL,
    "qwen3_omni": QWEN3,
    "qwen3_omni_nothink": QWEN,
    "qwen3_vl": QWEN3,
    "qwen3_vl_nothink": QWEN,
    "video_llava": VICUNA,
    "yi_vl": ChatFormat(
        user=("### Human: {{content}}\n### Assistant:",),
        assistant=("{{content}}\n",),
        default_system=(
            "This is a chat between an inquisitive human and an AI assistant. Assume the role of the AI assistant. "
            "Read all the images carefully, and respond to the human's questions with informative, helpful, detailed "
            "and polite answers. 这是一个好奇的人类和一个人工智能助手之间的对话。假设你扮演这个AI助手的角色。仔细阅"
            "读所有的图像，并对人类的问题做出信息丰富、有帮助、详细的和礼貌的回答。\n\n"
        ),
        stop_words=("###",),
        efficient_eos=True,
    ),
    "youtu_vl": ChatFormat(
        user=("<|begin_of_text|>user\n{{content}}<|end_of_text|>\n<|begin_of_text|>assistant\n",),
        assistant=("{{content}}<|end_of_text|>\n",),
        system=("<|begin_of_text|>system\n{{content}}<|end_of_text|>\n",),
        default_system="You are a helpful assistant.",
        stop_words=("<|end_of_text|>",),
    ),
    **OLDER,
}
