"""Small files in the official formats of every task, with the things that break readers in them."""

import json
from pathlib import Path

SENTENCES = {
    "en": ("The cat is asleep on the table in the kitchen.", "The animal is not awake."),
    "fr": ("Le chat dort sur la table dans la cuisine.", "L'animal ne dort pas du tout."),
    "es": ("El gato duerme en la mesa de la cocina.", "El animal no está despierto."),
    "de": ("Die Katze schläft auf dem Tisch in der Küche.", "Das Tier ist nicht wach."),
    "el": ("Η γάτα κοιμάται στο τραπέζι της κουζίνας.", "Το ζώο δεν είναι ξύπνιο."),
    "bg": ("Котката спи на масата в кухнята.", "Животното не е будно."),
    "ru": ("Кошка спит на столе на кухне.", "Животное не бодрствует."),
    "tr": ("Kedi mutfaktaki masanın üzerinde uyuyor.", "Hayvan uyanık değil."),
    "ar": ("القطة نائمة على الطاولة في المطبخ.", "الحيوان ليس مستيقظا."),
    "vi": ("Con mèo đang ngủ trên bàn trong bếp.", "Con vật không thức."),
    "th": ("แมวกำลังนอนหลับอยู่บนโต๊ะในครัว", "สัตว์ไม่ได้ตื่นอยู่"),
    "zh": ("猫正在厨房的桌子上睡觉。", "这只动物没有醒着。"),
    "hi": ("बिल्ली रसोई में मेज पर सो रही है।", "जानवर जागा हुआ नहीं है।"),
    "sw": ("Paka amelala juu ya meza jikoni.", "Mnyama hajaamka."),
    "ur": ("بلی باورچی خانے میں میز پر سو رہی ہے۔", "جانور جاگ نہیں رہا ہے۔"),
}
NLI = ("entailment", "neutral", "contradiction")

# Language → context and (question, answer) pairs. Decomposed accents in German, no blanks in
# Chinese, vowel signs in Hindi, right to left in Arabic.
CONTEXTS = {
    "en": (
        "The Normans were the people who gave their name to Normandy, a region in France. They"
        " were descended from Norse raiders and pirates from Denmark, Iceland and Norway.",
        [("In what country is Normandy located?", "France"),
         ("From which countries did the Norse originate?", "Denmark, Iceland and Norway")],
    ),
    "de": (
        "Die Ko\u0308nigin wohnt in einem Schloss aus dem 13. Jahrhundert. Ihr Café liegt in der"
        " Stadt München und ist für den Kuchen bekannt.",
        [("Wer wohnt im Schloss?", "Die Ko\u0308nigin"), ("Wo liegt das Café?", "Stadt München")],
    ),
    "es": (
        "La casa blanca de la montaña fue construida en 1905 por Antonio Gaudí y la familia.",
        [("¿Quién construyó la casa?", "Antonio Gaudí"), ("¿Cuándo fue construida?", "1905")],
    ),
    "ar": (
        "ولد الكاتب في مدينة القاهرة عام 1911، وتوفي فيها عام 2006.",
        [("أين ولد الكاتب؟", "مدينة القاهرة"), ("متى توفي الكاتب؟", "عام 2006")],
    ),
    "hi": (
        "महात्मा गांधी का जन्म पोरबंदर में हुआ था। वे भारत के राष्ट्रपिता हैं।",
        [("गांधी का जन्म कहाँ हुआ?", "पोरबंदर"), ("वे किसके राष्ट्रपिता हैं?", "भारत")],
    ),
    "vi": (
        "Hà Nội là thủ đô của nước Việt Nam và là thành phố lớn thứ hai của cả nước.",
        [("Thủ đô của Việt Nam là gì?", "Hà Nội"), ("Hà Nội lớn thứ mấy?", "thứ hai")],
    ),
    "zh": (
        "长江发源于青海省，全长6300公里，在上海市注入东海。",
        [("长江发源于哪里？", "青海省"), ("长江有多长？", "6300公里")],
    ),
}  # fmt: skip


def write_tsv(path: Path, *rows: tuple) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows), "utf-8")
    return path


def write_glue(folder: Path, *, examples: int = 12) -> Path:
    """All nine tasks. The second word of a sentence tells its class, so that it can be learnt."""
    numbers = range(examples)
    words = ("bad", "good")

    def text(i, classes=2):
        return f'The {("bad", "good", "plain")[i % classes]} film no. {i} is "unfinished'

    for name, split in (("train", 0), ("dev", 1)):
        rows = [("gj04", (i + split) % 2, "", text(i + split)) for i in numbers]
        write_tsv(folder / "CoLA" / f"{name}.tsv", *rows)
        rows = [(text(i), i % 2) for i in numbers]
        write_tsv(folder / "SST-2" / f"{name}.tsv", ("sentence", "label"), *rows)
        rows = [(i % 2, 2 * i, 2 * i + 1, text(i), f"It is {words[i % 2]}") for i in numbers]
        header = ("\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String")
        write_tsv(folder / "MRPC" / f"{name}.tsv", header, *rows)
        rows = [(i, i, i + 1, text(i), f"{words[i % 2]}?", i % 2) for i in numbers]
        header = ("id", "qid1", "qid2", "question1", "question2", "is_duplicate")
        # The official training file holds broken rows, which its readers skip.
        write_tsv(folder / "QQP" / f"{name}.tsv", header, *rows[:3], (9, "broken"), *rows[3:])
        header = ("index", "genre", "filename", "year", "old_index", "source1", "source2")
        header += ("sentence1", "sentence2", "score")
        rows = [(i, *"gfyos", "s", text(i), "A good film.", f"{i % 2 * 5}.000") for i in numbers]
        write_tsv(folder / "STS-B" / f"{name}.tsv", header, *rows)
        header = ("index", "promptID", "pairID", "genre", "sentence1_binary_parse")
        header += ("sentence2_binary_parse", "sentence1_parse", "sentence2_parse", "sentence1")
        header += ("sentence2", "label1", "gold_label")
        rows = [(i, *"ppgabcd", text(i, 3), "It is.", NLI[0], NLI[i % 3]) for i in numbers]
        rows.append((examples, *"ppgabcd", "No.", "Agreement.", NLI[0], "-"))
        for file in ("train",) if name == "train" else ("dev_matched", "dev_mismatched"):
            write_tsv(folder / "MNLI" / f"{file}.tsv", header, *rows)
        for task, columns in (
            ("QNLI", ("question", "sentence")),
            ("RTE", ("sentence1", "sentence2")),
        ):
            rows = [(i, text(i), "It is.", ("not_entailment", NLI[0])[i % 2]) for i in numbers]
            write_tsv(folder / task / f"{name}.tsv", ("index", *columns, "label"), *rows)
        rows = [(i, text(i), "It is.", i % 2) for i in numbers]
        header = ("index", "sentence1", "sentence2", "label")
        write_tsv(folder / "WNLI" / f"{name}.tsv", header, *rows)
    pairs = [(i, text(i), "It is.") for i in range(5)]
    for task in ("CoLA", "SST-2"):
        rows = [(i, a) for i, a, _ in pairs]
        write_tsv(folder / task / "test.tsv", ("index", "sentence"), *rows)
    header = ("index", "#1 ID", "#2 ID", "#1 String", "#2 String")
    write_tsv(folder / "MRPC" / "test.tsv", header, *[(i, 1, 2, a, b) for i, a, b in pairs])
    write_tsv(folder / "QQP" / "test.tsv", ("id", "question1", "question2"), *pairs)
    write_tsv(folder / "QNLI" / "test.tsv", ("index", "question", "sentence"), *pairs)
    for place in ("STS-B/test", "RTE/test", "WNLI/test", "MNLI/test_matched", "AX/AX"):
        write_tsv(folder / f"{place}.tsv", ("index", "sentence1", "sentence2"), *pairs)
    write_tsv(folder / "MNLI/test_mismatched.tsv", ("index", "sentence1", "sentence2"), *pairs)
    return folder


def write_xnli(folder: Path) -> Path:
    """Dev and test of 15 languages, training sets of two, one with the official misspelling."""
    header = ("language", "gold_label", "sentence1_binary_parse", "sentence2_binary_parse")
    header += ("sentence1_parse", "sentence2_parse", "sentence1", "sentence2", "promptID", "pairID")
    header += ("genre", "label1")
    rows = [
        (code, NLI[i % 3], "", "", "", "", a, (b, a, "No.")[i % 3], i, i, "facetoface", NLI[0])
        for code, (a, b) in SENTENCES.items()
        for i in range(6)
    ]
    for split in ("dev", "test"):
        write_tsv(folder / "XNLI-1.0" / f"xnli.{split}.tsv", header, *rows)
    for code in ("en", "de"):
        a, b = SENTENCES[code]
        labels = ("entailment", "neutral", "contradictory")
        rows = [(f"{a} {i}", (b, a, "No.")[i % 3], labels[i % 3]) for i in range(12)]
        file = folder / "XNLI-MT-1.0" / "multinli" / f"multinli.train.{code}.tsv"
        write_tsv(file, ("premise", "hypo", "label"), *rows)
    return folder


def squad(context, pairs, *, prefix="q", impossible=None) -> dict:
    """One article; `impossible` marks every question, and asks one more without an answer."""
    qas = []
    for index, (question, answer) in enumerate(pairs):
        qa = {"id": f"{prefix}{index}", "question": question}
        qa["answers"] = [{"text": answer, "answer_start": context.index(answer)}]
        qas.append(qa)
    if impossible is not None:
        for qa in qas:
            qa["is_impossible"] = False
        plausible = {"text": pairs[0][1], "answer_start": context.index(pairs[0][1])}
        qas.append(
            {"id": f"{prefix}x", "question": impossible, "answers": [], "is_impossible": True,
             "plausible_answers": [plausible]}
        )  # fmt: skip
    return {"title": prefix, "paragraphs": [{"context": context, "qas": qas}]}


def write_squad(folder: Path) -> Path:
    """Versions 1.1 and 2.0; training file and dev file have the same questions."""
    folder.mkdir(parents=True, exist_ok=True)
    context, pairs = CONTEXTS["en"]
    for split in ("train", "dev"):
        one = squad(context, pairs)
        two = squad(context, pairs, impossible="Who was the duke of Atlantis?")
        for version, article in (("1.1", one), ("2.0", two)):
            content = {"version": version, "data": [article]}
            (folder / f"{split}-v{version}.json").write_text(json.dumps(content))
    return folder


def write_mlqa(folder: Path) -> Path:
    """SQuAD 1.1 to train on, seven languages, and all 49 pairs for the test."""
    write_squad(folder)
    for split in ("dev", "test"):
        (folder / "MLQA_V1" / split).mkdir(parents=True, exist_ok=True)
        for context_code, (context, pairs) in CONTEXTS.items():
            for code, (_, asked) in CONTEXTS.items():
                mixed = [(q, a) for (q, _), (_, a) in zip(asked, pairs, strict=True)]
                name = f"{split}-context-{context_code}-question-{code}.json"
                content = {"version": "1.0", "data": [squad(context, mixed)]}
                text = json.dumps(content, ensure_ascii=False)
                (folder / "MLQA_V1" / split / name).write_text(text, "utf-8")
    return folder
