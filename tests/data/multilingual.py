"""A few lines in several scripts (Universal Declaration of Human Rights), for tests of tokenizers."""

from __future__ import annotations

LINES: dict[str, list[str]] = {
    "eng_Latn": [
        "Everyone has the right to life, liberty and the security of person.",
        "No one shall be held in slavery or servitude; slavery and the slave trade shall be prohibited in "
        "all their forms.",
        "No one shall be subjected to torture or to cruel, inhuman or degrading treatment or punishment.",
        "Everyone has the right to recognition everywhere as a person before the law.",
        "No one shall be subjected to arbitrary arrest, detention or exile.",
        "Everyone has the right to freedom of movement and residence within the borders of each State.",
        "Everyone has the right to leave any country, including his own, and to return to his country.",
        "Everyone has the right to seek and to enjoy in other countries asylum from persecution.",
        "Everyone has the right to a nationality.",
        "No one shall be arbitrarily deprived of his nationality nor denied the right to change his nationality.",
        "Marriage shall be entered into only with the free and full consent of the intending spouses.",
        "The family is the natural and fundamental group unit of society and is entitled to protection by "
        "society and the State.",
    ],
    "fin_Latn": [
        "Kullakin yksilöllä on oikeus elämään, vapauteen ja henkilökohtaiseen turvallisuuteen.",
        "Ketään ei saa pitää orjana tai orjuutettuna, kaikki orjuuden ja orjakaupan muodot on kiellettävä.",
        "Ketään ei saa kiduttaa eikä kohdella tai rangaista julmasti, epäinhimillisesti tai alentavasti.",
        "Jokaisella ihmisellä on kaikkialla oikeus siihen, että hänet henkilönä tunnustetaan lain edessä.",
        "Ketään ei saa mielivaltaisesti pidättää, vangita tai ajaa maanpakoon.",
        "Jokaisella on oikeus liikkua vapaasti ja valita asuinpaikkansa kunkin valtion sisällä.",
        "Jokaisella on oikeus lähteä maasta, myös omasta maastaan, ja palata maahansa.",
        "Jokaisella vainon kohteeksi joutuneella on oikeus hakea ja nauttia turvapaikkaa muissa maissa.",
        "Jokaisella on oikeus kansalaisuuteen.",
        "Keltään ei saa mielivaltaisesti riistää kansalaisuutta eikä evätä oikeutta kansalaisuuden vaihtamiseen.",
        "Avioliiton solmiminen tapahtukoon vain tulevien aviopuolisoiden vapaasta ja täydestä suostumuksesta.",
        "Perhe on yhteiskunnan luonnollinen ja perustava ydinosa ja sillä on oikeus yhteiskunnan ja valtion "
        "suojaan.",
    ],
    "zho_Hans": [
        "人人有权享有生命、自由和人身安全。",
        "任何人不得使为奴隶或奴役;一切形式的奴隶制度和奴隶买卖,均应予以禁止。",
        "任何人不得加以酷刑,或施以残忍的、不人道的或侮辱性的待遇或刑罚。",
        "人人在任何地方有权被承认在法律前的人格。",
        "任何人不得加以任意逮捕、拘禁或放逐。",
        "人人在各国境内有权自由迁徙和居住。",
        "人人有权离开任何国家,包括其本国在内,并有权返回他的国家。",
        "人人有权在其他国家寻求和享受庇护以避免迫害。",
        "人人有权享有国籍。",
        "任何人的国籍不得任意剥夺,亦不得否认其改变国籍的权利。",
        "只有经男女双方的自由和完全的同意,才能缔婚。",
        "家庭是天然的和基本的社会单元,并应受社会和国家的保护。",
    ],
    "arb_Arab": [
        "لكل فرد الحق في الحياة والحرية وسلامة شخصه.",
        "لا يجوز إسترقاق أو إستعباد أي شخص. ويحظر الإسترقاق وتجارة الرقيق بكافة أوضاعهما.",
        "لا يعرض أي إنسان للتعذيب ولا للعقوبات أو المعاملات القاسية أو الوحشية أو الحاطة بالكرامة.",
        "لكل إنسان أينما وجد الحق في أن يعترف بشخصيته القانونية.",
        "لا يجوز القبض على أي إنسان أو حجزه أو نفيه تعسفاً.",
        "لكل فرد حرية النقل واختيار محل إقامته داخل حدود كل دولة.",
        "يحق لكل فرد أن يغادر أية بلاد بما في ذلك بلده كما يحق له العودة إليه.",
        "لكل فرد الحق أن يلجأ إلى بلاد أخرى أو يحاول الالتجاء إليها هربا من الاضطهاد.",
        "لكل فرد حق التمتع بجنسية ما.",
        "لا يجوز حرمان شخص من جنسيته تعسفا أو إنكار حقه في تغييرها.",
        "لا يبرم عقد الزواج إلا برضى الطرفين الراغبين في الزواج رضى كاملا لا إكراه فيه.",
        "الأسرة هي الوحدة الطبيعية الأساسية للمجتمع ولها حق التمتع بحماية المجتمع والدولة.",
    ],
    "rus_Cyrl": [
        "Каждый человек имеет право на жизнь, на свободу и на личную неприкосновенность.",
        "Никто не должен содержаться в рабстве или в подневольном состоянии; рабство и работорговля "
        "запрещаются во всех их видах.",
        "Никто не должен подвергаться пыткам или жестоким, бесчеловечным или унижающим его достоинство "
        "обращению и наказанию.",
        "Каждый человек, где бы он ни находился, имеет право на признание его правосубъектности.",
        "Никто не может быть подвергнут произвольному аресту, задержанию или изгнанию.",
        "Каждый человек имеет право свободно передвигаться и выбирать себе местожительство в пределах "
        "каждого государства.",
        "Каждый человек имеет право покидать любую страну, включая свою собственную, и возвращаться в свою страну.",
        "Каждый человек имеет право искать убежища от преследования в других странах и пользоваться этим убежищем.",
        "Каждый человек имеет право на гражданство.",
        "Никто не может быть произвольно лишен своего гражданства или права изменить свое гражданство.",
        "Брак может быть заключен только при свободном и полном согласии обеих вступающих в брак сторон.",
        "Семья является естественной и основной ячейкой общества и имеет право на защиту со стороны общества "
        "и государства.",
    ],
    "hin_Deva": [
        "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
        "उन्हें बुद्धि और अन्तरात्मा की देन प्राप्त है और परस्पर उन्हें भाईचारे के भाव से बर्ताव करना चाहिए।",
    ],
    "tha_Thai": [
        "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    ],
    "heb_Hebr": [
        "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    ],
    "kor_Hang": [
        "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    ],
    "jpn_Jpan": [
        "すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    ],
}
"""Lines of each language."""
ALL_LINES = [line for lines in LINES.values() for line in lines]
"""All of them."""
ODD_TEXTS = [
    "",
    " ",
    "\n",
    " leading and trailing ",
    "\t tab\r\n\r\n  two  spaces   three\n",
    "don't I'LL we've ’s",
    "1 22 333 4444 55555 ٣٤٥ ½ Ⅷ",
    "👍🏽 👩\u200d👧 🇫🇮 1️⃣",
    "e\u0301 a\u0300\u0301 z\u0351\u036b",
    "\x00 a\x00b \x01\x7f\x85\u2028\ufeff\ufffd",
    "<|endoftext|> </s> <unk> <0x41> ▁ Ġ",
    "x" * 5_000,
    "漢" * 2_000,
    " " * 3_000 + "\n" * 3_000,
]
"""What tokenizers trip over."""
