# ruff: noqa: RUF001 - full-width commas are what the models use
"""Chat formats that LLaMA-Factory 0.9.3 had and 0.9.5 has no more, by their names there; checked against 0.9.3.

chatglm2 is not among them: it numbers its turns, which no slot can say.
"""

from dataclasses import replace

from jtune.data.templates.chat_format import BOS, EOS, ChatFormat, Token
from jtune.data.templates.forms import CHATML_TOOL, DEEPSEEK3, GLM4, INTERN2, LLAMA3

OLDER = {
    "aquila": ChatFormat(
        user=("Human: {{content}}###Assistant:",),
        assistant=("{{content}}###",),
        system=("System: {{content}}###",),
        default_system=(
            "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the human's questions."
        ),
        stop_words=("</s>",),
    ),
    "atom": ChatFormat(user=(BOS, "Human: {{content}}\n", EOS, BOS, "Assistant:"), assistant=("{{content}}\n", EOS)),
    "baichuan": ChatFormat(
        user=(Token("<reserved_102>"), "{{content}}", Token("<reserved_103>")),
        assistant=("{{content}}",),
        efficient_eos=True,
    ),
    "baichuan2": ChatFormat(
        user=("<reserved_106>{{content}}<reserved_107>",), assistant=("{{content}}",), efficient_eos=True
    ),
    "belle": replace(DEEPSEEK3, user=("Human: {{content}}\n\nBelle: ",), assistant=("{{content}}", EOS, "\n\n")),
    "bluelm": ChatFormat(user=(Token("[|Human|]:"), "{{content}}", Token("[|AI|]:"))),
    "codegeex2": ChatFormat(prefix=(Token("[gMASK]"), Token("sop"))),
    "codegeex4": replace(
        GLM4,
        user=("<|user|>\n{{content}}<|assistant|>\n",),
        assistant=("{{content}}",),
        observation=("<|observation|>\n{{content}}<|assistant|>\n",),
        default_system=(
            "你是一位智能编程助手，你叫CodeGeeX。你会为用户回答关于编程、代码、计算机方面的任何问题，并提供格式规范、"
            "可以执行、准确安全的代码，并在必要时提供详细的解释。"
        ),
    ),
    "cpm": replace(DEEPSEEK3, user=("<用户>{{content}}<AI>",)),
    "cpm3": replace(CHATML_TOOL, prefix=(BOS,)),
    "intern": ChatFormat(
        user=("<|User|>:{{content}}\n<|Bot|>:",),
        assistant=("{{content}}<eoa>\n",),
        system=("<|System|>:{{content}}\n",),
        prefix=(BOS,),
        default_system=INTERN2.default_system,
        stop_words=("<eoa>",),
    ),
    "marco": replace(
        CHATML_TOOL,
        default_system=(
            "你是一个经过良好训练的AI助手，你的名字是Marco-o1.由阿里国际数字商业集团的AI Business创造.\n"
            "## 重要！！！！！\n"
            "当你回答问题时，你的思考应该在<Thought>内完成，<Output>内输出你的结果。\n"
            "<Thought>应该尽可能是英文，但是有2个特例，一个是对原文中的引用，另一个是是数学应该使用markdown格式，"
            "<Output>内的输出需要遵循用户输入的语言。\n"
        ),
    ),
    "orion": replace(DEEPSEEK3, user=("Human: {{content}}\n\nAssistant: ", EOS)),
    "skywork_o1": replace(
        LLAMA3,
        default_system=(
            "You are Skywork-o1, a thinking model developed by Skywork AI, specializing in solving complex problems "
            "involving mathematics, coding, and logical reasoning through deep thought. When faced with a user's "
            "request, you first engage in a lengthy and in-depth thinking process to explore possible solutions to the "
            "problem. After completing your thoughts, you then provide a detailed explanation of the solution process "
            "in your response."
        ),
        replace_eos=False,
    ),
    "telechat": ChatFormat(user=("<_user>{{content}}<_bot>",), system=("<_system>{{content}}<_end>",)),
    "xverse": ChatFormat(user=("Human: {{content}}\n\nAssistant: ",)),
    "yayi": ChatFormat(
        user=(Token("<|Human|>"), ":\n{{content}}\n\n", Token("<|YaYi|>"), ":"),
        assistant=("{{content}}\n\n",),
        system=(Token("<|System|>"), ":\n{{content}}\n\n"),
        default_system=(
            "You are a helpful, respectful and honest assistant named YaYi developed by Beijing Wenge Technology "
            "Co.,Ltd. Always answer as helpfully as possible, while being safe.  Your answers should not include any "
            "harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure that your "
            "responses are socially unbiased and positive in nature.\n\nIf a question does not make any sense, or is "
            "not factually coherent, explain why instead of answering something not correct. If you don't know the "
            "answer to a question, please don't share false information."
        ),
        stop_words=("<|End|>",),
    ),
    "ziya": ChatFormat(user=("<human>:{{content}}\n<bot>:",), assistant=("{{content}}\n",)),
}
