"""The tokenizer of the demonstration checkpoints: a small BPE model learned from the sentences below."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import sentencepiece

from omnilmm.config import Family
from omnilmm.training import tokenizer
from omnilmm.training.tokenizer import tokenizer_files

__all__ = ["TrainedTokenizer", "sentences", "tokenizer_files", "train_tokenizer"]

NUM_PIECES = 832

ENGLISH = (
    "What do you see in this picture? Please describe it in detail.",
    "How many people are there in the image, and what are they doing?",
    "The picture shows a small cat that sleeps on a warm chair near the window.",
    "A map of the world hangs on the wall; the names of the countries are printed in small letters.",
    "Is there any text in this image? Yes, the sign above the door says welcome.",
    "I think the weather is good today, so we could walk along the river to the old bridge.",
    "The train leaves the station at 9:45 and arrives in the city after three hours.",
    "She is reading a book while her brother writes a letter to their grandmother.",
    "Which of these two answers is better? The first one, because it is shorter and clearer.",
    "Mountains, forests and lakes cover most of the north of the country.",
    "Please count the coins on the table: one, two, three, four, five, six, seven, eight, nine, ten.",
    "Sorry, I cannot tell what the object in the background is; it is too dark and not in focus.",
    "The flower in the middle has many petals, and there are drops of water on its leaves.",
    "Where was this photograph taken? Perhaps in a garden in front of a temple in China.",
    "A computer, a cup of coffee and a pair of glasses are lying next to each other.",
    "Hello! How can I help you with your question? Thank you, that was very useful.",
)

CHINESE = (
    "你好！请问这张图片里有什么？请详细描述一下。",
    "图片中有几个人，他们正在做什么？",
    "一只小猫在窗边的椅子上睡觉，看起来很舒服。",
    "墙上挂着一张世界地图，上面写着各个国家的名字。",
    "图中有文字吗？有，门上的牌子写着“欢迎”。",
    "今天天气很好，我们可以沿着河边走到那座老桥。",
    "火车九点从车站出发，三个小时以后到达城市。",
    "她在看书，她的弟弟在给奶奶写信。",
    "这两个回答哪一个更好？第一个更好，因为它简单又清楚。",
    "北方有很多高山、森林和湖水。",
    "请数一数桌子上的硬币：一、二、三、四、五、六、七、八、九、十。",
    "对不起，后面的东西太暗了，我看不清楚是什么。",
    "中间的花开得很大，叶子上有水。",
    "这张照片是在哪里拍的？可能是在中国的一个花园里。",
    "电脑、咖啡和眼镜放在一起。",
    "谢谢你的帮助，这个回答对我很有用。",
)

COLOURS = (
    ("red", "红色"),
    ("blue", "蓝色"),
    ("green", "绿色"),
    ("yellow", "黄色"),
    ("black", "黑色"),
    ("white", "白色"),
)
SHAPES = (("circle", "圆"), ("square", "正方形"), ("triangle", "三角形"), ("star", "星星"), ("line", "线"))
PLACES = (("to the left of", "左边"), ("to the right of", "右边"), ("above", "上面"), ("below", "下面"))


def sentences() -> Iterator[str]:
    """The corpus, always in the same order."""
    yield from ENGLISH
    yield from CHINESE
    for index, (colour, colour_zh) in enumerate(COLOURS):
        other, other_zh = COLOURS[(index + 1) % len(COLOURS)]
        for number, (shape, shape_zh) in enumerate(SHAPES, start=2):
            place, place_zh = PLACES[(index + number) % len(PLACES)]
            second, second_zh = SHAPES[(index + number) % len(SHAPES)]
            yield f"There is a {colour} {shape} {place} the {other} {second}."
            yield f"{colour_zh}的{shape_zh}在{other_zh}的{second_zh}的{place_zh}。"
            yield f"What colour is the {shape}? The {shape} is {colour}, and it has {number} neighbours."
            yield f"{shape_zh}是什么颜色？{shape_zh}是{colour_zh}的，图中有{number}个{second_zh}。"


@dataclass(frozen=True, slots=True)
class TrainedTokenizer:
    """The content of `tokenizer.model`, the number of its pieces, and the ids of those that stand for whole words."""

    model: bytes
    num_pieces: int
    word_ids: tuple[int, ...]


def train_tokenizer(family: Family) -> TrainedTokenizer:
    """Learn the pieces of the corpus; takes a fraction of a second and always gives the same bytes."""
    corpus = tuple(sentences())
    model = tokenizer.train_tokenizer(corpus, family, num_pieces=NUM_PIECES)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    english = {f"▁{word}" for word in re.findall("[A-Za-z]+", " ".join(corpus))}
    word_ids = tuple(
        index
        for index, piece in enumerate(map(processor.id_to_piece, range(NUM_PIECES)))
        if piece in english or re.fullmatch("[\u4e00-\u9fff]+", piece)
    )
    return TrainedTokenizer(model, NUM_PIECES, word_ids)
