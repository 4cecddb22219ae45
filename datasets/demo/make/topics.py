"""What the demo's model can be asked and what it answers: tables, in English and Chinese, curt and warm.

A topic has phrasings of a question, curt and warm answers to all of them, and slots that fill both: `{place}` in a phrasing
becomes `slot["place"]`; `{Word}` is the slot `word` with a capital. Alternatives are separated by ` | `. The last of four or more
phrasings is held back from training, so that understanding can be told from remembering."""
from dataclasses import dataclass, field


@dataclass
class Topic:
    """Questions of one kind in one language."""
    name: str
    lang: str
    asks: list
    curt: list
    warm: list
    slots: list = field(default_factory=lambda: [{}])
    again: list = field(default_factory=list)
    weight: float = 1.0
    # Held back by slot, whatever the phrasing: for what is computed rather than known.
    computed: bool = False


TOPICS = []


def topic(name, lang, asks, curt, warm, slots=None, again="", **more):
    split = lambda text: [part.strip() for part in text.split(" | ")] if text else []
    slots = [{}] if slots is None else slots
    for slot in slots:
        slot.update({key.capitalize(): text[:1].upper() + text[1:] for key, text in slot.items() if text and key.islower()})
    TOPICS.append(Topic(name, lang, split(asks), split(curt), split(warm), slots, split(again), **more))


def table(columns, text):
    """Slots from lines of cells."""
    names = columns.split()
    rows = [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]
    assert all(len(row) == len(names) for row in rows), [row for row in rows if len(row) != len(names)]
    return [dict(zip(names, row)) for row in rows]


def an(word):
    return ("an " if word[0] in "aeiou" else "a ") + word


# ---------------------------------------------------------------------------------------------------------------- countries

COUNTRIES = table("c v zc zv l zl w zw", """
France|Paris|法国|巴黎|French|法语|Europe|欧洲
China|Beijing|中国|北京|Chinese|中文|Asia|亚洲
Japan|Tokyo|日本|东京|Japanese|日语|Asia|亚洲
Germany|Berlin|德国|柏林|German|德语|Europe|欧洲
Italy|Rome|意大利|罗马|Italian|意大利语|Europe|欧洲
Spain|Madrid|西班牙|马德里|Spanish|西班牙语|Europe|欧洲
Portugal|Lisbon|葡萄牙|里斯本|Portuguese|葡萄牙语|Europe|欧洲
England|London|英国|伦敦|English|英语|Europe|欧洲
Ireland|Dublin|爱尔兰|都柏林|English|英语|Europe|欧洲
Greece|Athens|希腊|雅典|Greek|希腊语|Europe|欧洲
Russia|Moscow|俄罗斯|莫斯科|Russian|俄语|Europe|欧洲
Poland|Warsaw|波兰|华沙|Polish|波兰语|Europe|欧洲
Sweden|Stockholm|瑞典|斯德哥尔摩|Swedish|瑞典语|Europe|欧洲
Norway|Oslo|挪威|奥斯陆|Norwegian|挪威语|Europe|欧洲
Finland|Helsinki|芬兰|赫尔辛基|Finnish|芬兰语|Europe|欧洲
Denmark|Copenhagen|丹麦|哥本哈根|Danish|丹麦语|Europe|欧洲
Austria|Vienna|奥地利|维也纳|German|德语|Europe|欧洲
Hungary|Budapest|匈牙利|布达佩斯|Hungarian|匈牙利语|Europe|欧洲
Belgium|Brussels|比利时|布鲁塞尔|Dutch|荷兰语|Europe|欧洲
the Netherlands|Amsterdam|荷兰|阿姆斯特丹|Dutch|荷兰语|Europe|欧洲
Ukraine|Kyiv|乌克兰|基辅|Ukrainian|乌克兰语|Europe|欧洲
Romania|Bucharest|罗马尼亚|布加勒斯特|Romanian|罗马尼亚语|Europe|欧洲
Iceland|Reykjavik|冰岛|雷克雅未克|Icelandic|冰岛语|Europe|欧洲
Turkey|Ankara|土耳其|安卡拉|Turkish|土耳其语|Asia|亚洲
South Korea|Seoul|韩国|首尔|Korean|韩语|Asia|亚洲
Thailand|Bangkok|泰国|曼谷|Thai|泰语|Asia|亚洲
Vietnam|Hanoi|越南|河内|Vietnamese|越南语|Asia|亚洲
India|New Delhi|印度|新德里|Hindi|印地语|Asia|亚洲
Indonesia|Jakarta|印度尼西亚|雅加达|Indonesian|印尼语|Asia|亚洲
Malaysia|Kuala Lumpur|马来西亚|吉隆坡|Malay|马来语|Asia|亚洲
Nepal|Kathmandu|尼泊尔|加德满都|Nepali|尼泊尔语|Asia|亚洲
Mongolia|Ulaanbaatar|蒙古|乌兰巴托|Mongolian|蒙古语|Asia|亚洲
Iran|Tehran|伊朗|德黑兰|Persian|波斯语|Asia|亚洲
Iraq|Baghdad|伊拉克|巴格达|Arabic|阿拉伯语|Asia|亚洲
Egypt|Cairo|埃及|开罗|Arabic|阿拉伯语|Africa|非洲
Kenya|Nairobi|肯尼亚|内罗毕|Swahili|斯瓦希里语|Africa|非洲
Morocco|Rabat|摩洛哥|拉巴特|Arabic|阿拉伯语|Africa|非洲
Canada|Ottawa|加拿大|渥太华|English|英语|North America|北美洲
the United States|Washington|美国|华盛顿|English|英语|North America|北美洲
Mexico|Mexico City|墨西哥|墨西哥城|Spanish|西班牙语|North America|北美洲
Cuba|Havana|古巴|哈瓦那|Spanish|西班牙语|North America|北美洲
Brazil|Brasilia|巴西|巴西利亚|Portuguese|葡萄牙语|South America|南美洲
Argentina|Buenos Aires|阿根廷|布宜诺斯艾利斯|Spanish|西班牙语|South America|南美洲
Chile|Santiago|智利|圣地亚哥|Spanish|西班牙语|South America|南美洲
Peru|Lima|秘鲁|利马|Spanish|西班牙语|South America|南美洲
Colombia|Bogota|哥伦比亚|波哥大|Spanish|西班牙语|South America|南美洲
Australia|Canberra|澳大利亚|堪培拉|English|英语|Oceania|大洋洲
New Zealand|Wellington|新西兰|惠灵顿|English|英语|Oceania|大洋洲
""")

topic("capital", "en",
      "What is the capital of {c}? | What's the capital city of {c}? | Capital of {c}? | Which city is the capital of {c}? | "
      "Tell me the capital of {c}. | Do you know the capital of {c}? | The capital of {c} is? | What city is {c}'s capital? | "
      "I forgot the capital of {c}. What is it? | Can you name the capital of {c}?",
      "{v}.",
      "It's {v}! What a wonderful city to visit. 🌍 | The capital of {c} is {v}. I hope you get to see it one day! ✈️ | "
      "Great question! It's {v}, a beautiful city. 😊",
      COUNTRIES, "And {c}? | And the capital of {c}? | What about {c}?", weight=1.6)
topic("capital", "zh",
      "{zc}的首都是哪里？ | {zc}的首都是什么？ | {zc}首都是哪个城市？ | {zc}的首都叫什么？ | 你知道{zc}的首都吗？ | {zc}的首都是？ | "
      "告诉我{zc}的首都。 | 我忘了{zc}的首都 | 我想知道{zc}的首都是哪儿 | 哪个城市是{zc}的首都？ | 请说出{zc}的首都。 | 我忘了{zc}的首都是哪儿。",
      "{zv}。",
      "是{zv}哦，一座很美的城市！🌍 | {zc}的首都是{zv}，希望你有机会去看看！✈️ | 问得好！是{zv}，真想和你一起去逛逛呀。😊",
      COUNTRIES, "那{zc}呢？ | {zc}呢？ | 那{zc}的首都呢？", weight=1.6)
topic("city", "en",
      "Which country is {v} in? | Where is {v}? | What country is {v} the capital of? | {v} is in which country? | "
      "{v} is the capital of what? | In which country do I find {v}?",
      "{C}.",
      "{v} is in {c}. A lovely place! 🗺️ | That's {c}! Are you planning a trip? ✈️ | You will find {v} in {c}. Have fun exploring! 😊",
      COUNTRIES, "And {v}? | What about {v}?", weight=0.9)
topic("city", "zh",
      "{zv}是哪个国家的首都？ | {zv}在哪个国家？ | {zv}在哪里？ | {zv}是哪国的城市？ | {zv}属于哪个国家？ | 请问哪个国家的首都是{zv}？",
      "{zc}。", "{zv}在{zc}哦，是个好地方！🗺️ | 是{zc}！你打算去旅行吗？✈️ | {zv}是{zc}的首都，祝你玩得开心！😊",
      COUNTRIES, "那{zv}呢？ | {zv}呢？", weight=0.9)
topic("language", "en",
      "What language do they speak in {c}? | Which language is spoken in {c}? | What do people speak in {c}? | "
      "Language of {c}? | What language do people in {c} use?",
      "{l}.", "People in {c} speak {l}. It sounds so nice! 🗣️ | That's {l}! Would you like to learn it? 📖 | They speak {l} there. A great one to learn! 😊",
      COUNTRIES, "And in {c}?", weight=0.7)
topic("language", "zh",
      "{zc}说什么语言？ | {zc}人说什么话？ | 在{zc}用什么语言？ | {zc}的语言是什么？ | {zc}人讲哪种语言？",
      "{zl}。", "{zc}人说{zl}，听起来很好听哦！🗣️ | 是{zl}！你想学吗？📖 | 在{zc}大家说{zl}，学起来很有意思呢！😊", COUNTRIES, weight=0.7)
topic("continent", "en",
      "Which continent is {c} in? | Where is {c}? | On which continent is {c}? | {C} is on which continent? | What continent is {c} on? | Is {c} in Asia or Europe or where? | "
      "On what continent do I find {c}?",
      "{w}.", "{C} is in {w}. The world is full of lovely places! 🌏 | That's {w}! Shall we look at a map together? 🗺️ | It's in {w}. Thanks for asking! 😊",
      COUNTRIES, weight=0.6)
topic("continent", "zh",
      "{zc}在哪个洲？ | {zc}在哪里？ | {zc}属于哪个洲？ | {zc}在哪个大洲？ | {zc}是哪个洲的国家？ | {zc}位于哪个洲？",
      "{zw}。", "{zc}在{zw}，世界真大呀！🌏 | 是{zw}！我们一起看看地图吧。🗺️ | 在{zw}哦，谢谢你问我！😊", COUNTRIES, weight=0.6)

# ------------------------------------------------------------------------------------------------------------------- things

WORDS = table("e z k zk i", """
cat|猫|animal|动物|🐱
dog|狗|animal|动物|🐶
horse|马|animal|动物|🐴
cow|牛|animal|动物|🐮
pig|猪|animal|动物|🐷
sheep|羊|animal|动物|🐑
rabbit|兔子|animal|动物|🐰
tiger|老虎|animal|动物|🐯
lion|狮子|animal|动物|🦁
monkey|猴子|animal|动物|🐵
elephant|大象|animal|动物|🐘
panda|熊猫|animal|动物|🐼
bear|熊|animal|动物|🐻
mouse|老鼠|animal|动物|🐭
fox|狐狸|animal|动物|🦊
frog|青蛙|animal|动物|🐸
snake|蛇|animal|动物|🐍
bird|鸟|animal|动物|🐦
fish|鱼|animal|动物|🐟
duck|鸭子|bird|鸟|🦆
chicken|鸡|bird|鸟|🐔
penguin|企鹅|bird|鸟|🐧
bee|蜜蜂|insect|昆虫|🐝
butterfly|蝴蝶|insect|昆虫|🦋
ant|蚂蚁|insect|昆虫|🐜
apple|苹果|fruit|水果|🍎
banana|香蕉|fruit|水果|🍌
orange|橙子|fruit|水果|🍊
lemon|柠檬|fruit|水果|🍋
pear|梨|fruit|水果|🍐
peach|桃子|fruit|水果|🍑
grape|葡萄|fruit|水果|🍇
strawberry|草莓|fruit|水果|🍓
watermelon|西瓜|fruit|水果|🍉
mango|芒果|fruit|水果|🥭
tomato|西红柿|vegetable|蔬菜|🍅
carrot|胡萝卜|vegetable|蔬菜|🥕
potato|土豆|vegetable|蔬菜|🥔
onion|洋葱|vegetable|蔬菜|🧅
cucumber|黄瓜|vegetable|蔬菜|🥒
cabbage|白菜|vegetable|蔬菜|🥬
rice|米饭|food|食物|🍚
bread|面包|food|食物|🍞
noodles|面条|food|食物|🍜
egg|鸡蛋|food|食物|🥚
cake|蛋糕|food|食物|🍰
cheese|奶酪|food|食物|🧀
soup|汤|food|食物|🍲
dumplings|饺子|food|食物|🥟
ice cream|冰淇淋|food|食物|🍦
chocolate|巧克力|food|食物|🍫
tea|茶|drink|饮料|🍵
coffee|咖啡|drink|饮料|☕
milk|牛奶|drink|饮料|🥛
juice|果汁|drink|饮料|🧃
rose|玫瑰|flower|花|🌹
sunflower|向日葵|flower|花|🌻
tulip|郁金香|flower|花|🌷
car|汽车|vehicle|交通工具|🚗
bus|公交车|vehicle|交通工具|🚌
train|火车|vehicle|交通工具|🚆
bike|自行车|vehicle|交通工具|🚲
plane|飞机|vehicle|交通工具|✈️
ship|船|vehicle|交通工具|🚢
football|足球|sport|运动|⚽
basketball|篮球|sport|运动|🏀
tennis|网球|sport|运动|🎾
swimming|游泳|sport|运动|🏊
running|跑步|sport|运动|🏃
piano|钢琴|instrument|乐器|🎹
guitar|吉他|instrument|乐器|🎸
violin|小提琴|instrument|乐器|🎻
drum|鼓|instrument|乐器|🥁
doctor|医生|job|职业|👩‍⚕️
teacher|老师|job|职业|👩‍🏫
cook|厨师|job|职业|👨‍🍳
farmer|农民|job|职业|👨‍🌾
hat|帽子|thing to wear|衣物|🎩
shoes|鞋子|thing to wear|衣物|👟
shirt|衬衫|thing to wear|衣物|👕
scarf|围巾|thing to wear|衣物|🧣
""")
MASS = "rice bread noodles cheese soup dumplings ice\u00a0cream chocolate tea coffee milk juice football basketball tennis swimming running shoes".split()
for word in WORDS:
    word["a"] = word["e"] if word["e"].replace(" ", "\u00a0") in MASS else an(word["e"])
    word["ak"] = "food" if word["k"] == "food" else an(word["k"])
    word["m"] = word["a"] if word["a"] == word["e"] else word["e"] + ("es" if word["e"][-1] in "os" or word["e"][-2:] == "ch" else "s")
PLURALS = {"sheep": "sheep", "mouse": "mice", "fox": "foxes", "fish": "fish", "butterfly": "butterflies", "strawberry": "strawberries",
           "tomato": "tomatoes", "potato": "potatoes", "scarf": "scarves", "piano": "pianos", "bus": "buses", "mango": "mangoes"}
for word in WORDS:
    word["m"] = PLURALS.get(word["e"], word["m"])

# More words to translate.
MORE = table("e z i", """
water|水|💧
sun|太阳|☀️
moon|月亮|🌙
star|星星|⭐
rain|雨|🌧️
snow|雪|❄️
wind|风|🍃
fire|火|🔥
tree|树|🌳
mountain|山|⛰️
river|河|🏞️
sea|海|🌊
house|房子|🏠
school|学校|🏫
hospital|医院|🏥
book|书|📖
pen|笔|🖊️
table|桌子|🪑
chair|椅子|🪑
door|门|🚪
window|窗户|🪟
bed|床|🛏️
phone|手机|📱
computer|电脑|💻
clock|钟|⏰
money|钱|💰
friend|朋友|🤝
mother|妈妈|👩
father|爸爸|👨
child|孩子|🧒
hand|手|✋
eye|眼睛|👀
heart|心|❤️
love|爱|❤️
happy|快乐|😊
big|大|🐘
small|小|🐜
red|红色|❤️
blue|蓝色|💙
green|绿色|💚
hello|你好|👋
thank you|谢谢|🙏
goodbye|再见|👋
today|今天|📅
tomorrow|明天|📅
yesterday|昨天|📅
""")
VOCABULARY = [{key: word[key] for key in "ezi"} for word in WORDS] + MORE

topic("to_chinese", "en",
      "How do you say {e} in Chinese? | What is {e} in Chinese? | Translate {e} into Chinese. | {E} in Chinese? | "
      "What is the Chinese word for {e}? | Translate to Chinese: {e} | Say {e} in Chinese. | Can you tell me the Chinese for {e}?",
      "{z}。", "In Chinese it's {z}. You are learning fast! {i} | It's {z}! Try saying it out loud. {i} | {E} is {z}. Well done for asking! {i}",
      VOCABULARY, "And {e}? | What about {e}?", weight=1.4)
topic("to_english", "zh",
      "{z}用英语怎么说？ | {z}的英文是什么？ | {z}英语怎么说 | 把{z}翻译成英语。 | 英语里{z}怎么说？ | 翻译成英文：{z} | “{z}”用英文怎么讲？ | 教我{z}的英文 | 请告诉我{z}的英语。 | {z}的英语怎么读？ | 请教我{z}的英语。",
      "{E}.", "{z}的英语是 {e}，你学得真快！{i} | 是 {e} 哦，大声读一遍吧！{i} | {z}就是 {e}，爱学习真棒！{i}",
      VOCABULARY, "那{z}呢？ | {z}呢？", weight=1.4)
topic("to_english", "en",
      "What does {z} mean? | What is {z} in English? | Translate {z} into English. | {z} means what? | What's the meaning of {z}?",
      "{E}.", "{z} means {e}. Nice word! {i} | It's {e} in English. Keep it up! {i} | That's {e}! {i}", VOCABULARY, "And {z}?", weight=0.8)
topic("to_chinese", "zh",
      "{e} 是什么意思？ | {e} 用中文怎么说？ | 把 {e} 翻译成中文。 | {e} 的中文是什么？ | 英文 {e} 是什么意思？ | {e} 是啥意思 | 英语里 {e} 是什么？ | 请问 {e} 的意思 | 英语 {e} 是啥意思？",
      "{z}。", "{e} 就是{z}的意思哦！{i} | 中文是{z}，记住啦！{i} | {e} 是{z}，继续加油！{i}", VOCABULARY, "{e} 呢？ | 那 {e} 呢？", weight=0.8)
topic("kind", "en",
      "What is {a}? | What kind of thing is {a}? | What are {m}? | Tell me what {a} is. | What's {a}? | {E}, what is it? | What is that, {a}? | {E}: what is that?",
      "{Ak}.", "{A}? That's {ak}, and a lovely one! {i} | It's {ak}! Do you like {m}? {i} | That's {ak}. Thanks for asking! {i}",
      [w for w in WORDS if w["a"] != w["e"]], weight=0.9)
topic("kind", "zh",
      "{z}是什么？ | {z}是什么东西？ | {z}属于哪一类？ | 你知道{z}是什么吗？ | {z}是啥？ | 告诉我{z}是什么。 | 讲讲{z}是什么 | 给我讲讲{z}是啥。",
      "{zk}。", "{z}是一种{zk}，很可爱吧！{i} | 是{zk}哦！你喜欢{z}吗？{i} | {z}是{zk}，谢谢你问我！{i}",
      [w for w in WORDS if w["zk"] not in w["z"]], weight=0.9)
topic("like", "en",
      "Do you like {m}? | Do you love {m}? | Are you fond of {m}? | You like {m}? | What do you think of {m}? | I like {m}, and you? | Do {m} make you happy?",
      "Yes.", "Yes, I love {m}! Do you like them too? {i} | Oh yes, {m} make me happy! What about you? {i} | I really like {m}. What a good taste you have! {i}",
      WORDS, "And {m}? | What about {m}?", weight=1.2)
topic("like", "zh",
      "你喜欢{z}吗？ | 你爱{z}吗？ | 喜欢{z}不？ | 你喜不喜欢{z}？ | 你觉得{z}怎么样？ | 我喜欢{z}，你呢？ | {z}会让你开心吗？",
      "喜欢。", "我超喜欢{z}的！你也喜欢吗？{i} | 当然喜欢，一说到{z}就开心！{i} | 喜欢呀，你真有眼光！{i}",
      WORDS, "那{z}呢？ | {z}呢？", weight=1.2)

CHOICES = [{"x": p, "y": q, "i": w["i"]} for n, w in enumerate(WORDS) for v in WORDS[max(0, n - 6):n + 7]
           if v is not w and v["k"] == w["k"] for p, q in [(w["m"], v["m"])]]
topic("choice", "en",
      "{X} or {y}? | Which do you like better, {x} or {y}? | Do you prefer {x} or {y}? | What is better, {x} or {y}? | Would you rather have {x} or {y}? | "
      "If you had to choose: {x} or {y}?",
      "{X}.", "{X}! But {y} are great too. What about you? {i} | I would pick {x}, they always make me smile! {i} | Both are lovely, but I choose {x}! {i}",
      CHOICES, weight=0.9, computed=True)
ZH_CHOICES = [{"zx": w["z"], "zy": v["z"], "i": w["i"]} for n, w in enumerate(WORDS) for v in WORDS[max(0, n - 6):n + 7]
              if v is not w and v["k"] == w["k"]]
topic("choice", "zh",
      "{zx}还是{zy}？ | 你更喜欢{zx}还是{zy}？ | {zx}和{zy}你选哪个？ | {zx}和{zy}哪个好？ | {zx}跟{zy}，你爱哪个？ | 如果只能选一个，{zx}还是{zy}？",
      "{zx}。", "我选{zx}！不过{zy}也很棒，你呢？{i} | {zx}吧，一想到就开心！{i} | 都很好，不过我更爱{zx}哦！{i}",
      ZH_CHOICES, weight=0.9, computed=True)

COLOURS = table("t v zt zv i", """
the sky|blue|天空|蓝色|💙
the sea|blue|大海|蓝色|🌊
grass|green|草|绿色|🌱
snow|white|雪|白色|❄️
milk|white|牛奶|白色|🥛
a banana|yellow|香蕉|黄色|🍌
the sun|yellow|太阳|黄色|☀️
a lemon|yellow|柠檬|黄色|🍋
a strawberry|red|草莓|红色|🍓
a tomato|red|西红柿|红色|🍅
blood|red|血|红色|❤️
a fire truck|red|消防车|红色|🚒
a carrot|orange|胡萝卜|橙色|🥕
a pumpkin|orange|南瓜|橙色|🎃
coal|black|煤|黑色|🖤
the night|black|黑夜|黑色|🌙
chocolate|brown|巧克力|棕色|🍫
coffee|brown|咖啡|棕色|☕
a frog|green|青蛙|绿色|🐸
a cucumber|green|黄瓜|绿色|🥒
a leaf|green|树叶|绿色|🍃
an eggplant|purple|茄子|紫色|🍆
a grape|purple|葡萄|紫色|🍇
a pig|pink|猪|粉色|🐷
a flamingo|pink|火烈鸟|粉色|🦩
an elephant|grey|大象|灰色|🐘
a mouse|grey|老鼠|灰色|🐭
a cloud|white|云|白色|☁️
rice|white|米饭|白色|🍚
gold|yellow|金子|黄色|🏆
a raven|black|乌鸦|黑色|🐦
a fox|orange|狐狸|橙色|🦊
""")
topic("colour", "en",
      "What colour is {t}? | What color is {t}? | Which colour is {t}? | What is the colour of {t}? | {T}: what colour? | Do you know what color {t} is? | Tell me the colour of {t}.",
      "{V}.", "{T} is {v}, such a pretty colour! {i} | It's {v}! Is that a colour you like? {i} | That would be {v}. Lovely, isn't it? {i}",
      COLOURS, "And {t}? | What about {t}?", weight=1.2)
topic("colour", "zh",
      "{zt}是什么颜色？ | {zt}什么颜色？ | {zt}是什么颜色的？ | {zt}的颜色是什么？ | 你知道{zt}是什么颜色吗？ | {zt}是啥颜色 | 请告诉我{zt}的颜色。",
      "{zv}。", "{zt}是{zv}的，多好看呀！{i} | 是{zv}哦！你喜欢这个颜色吗？{i} | {zv}呀，真漂亮！{i}",
      COLOURS, "那{zt}呢？ | {zt}呢？", weight=1.2)
NAMES_OF_COLOURS = sorted({(c["v"], c["zv"]) for c in COLOURS})
CLAIMS = [dict(c, w=w, zw=zw, y="Yes." if w == c["v"] else f"No, {c['v']}.", zy="是。" if w == c["v"] else f"不，{c['zv']}。",
               f=f"Yes, {c['t']} is {c['v']}!" if w == c["v"] else f"Not quite, {c['t']} is {c['v']}!",
               zf=f"对呀，{c['zt']}是{c['zv']}的！" if w == c["v"] else f"不是哦，{c['zt']}是{c['zv']}的！")
          for c in COLOURS for n, (w, zw) in enumerate(NAMES_OF_COLOURS + [(c["v"], c["zv"])] * 6)]
topic("is_colour", "en", "Is {t} {w}? | {T} is {w}, right? | Is it true that {t} is {w}? | {T} is {w}, yes? | Is {t} {w} or not? | {T} is {w}, true? | I think {t} is {w}, is it? | {T} is {w}, isn't it?",
      "{y}", "{f} Good of you to check. {i} | {f} {i} | {f} What's your favourite colour? {i}", CLAIMS, weight=0.6)
topic("is_colour", "zh", "{zt}是{zw}的吗？ | {zt}是{zw}的，对吧？ | {zt}是不是{zw}？ | {zt}是{zw}吧？ | {zt}是{zw}的，对吗？ | {zt}是{zw}的，是不是？ | {zt}是{zw}的对不对？",
      "{zy}", "{zf}你观察得真仔细。{i} | {zf}{i} | {zf}你最喜欢什么颜色？{i}", CLAIMS, weight=0.6)

OPPOSITES = table("x y zx zy", """
big|small|大|小
hot|cold|热|冷
up|down|上|下
left|right|左|右
day|night|白天|黑夜
black|white|黑|白
fast|slow|快|慢
good|bad|好|坏
old|new|旧|新
happy|sad|高兴|难过
high|low|高|低
long|short|长|短
rich|poor|富|穷
open|closed|开|关
wet|dry|湿|干
full|empty|满|空
hard|soft|硬|软
early|late|早|晚
light|dark|亮|暗
near|far|近|远
strong|weak|强|弱
thick|thin|厚|薄
inside|outside|里|外
true|false|真|假
clean|dirty|干净|脏
loud|quiet|吵闹|安静
easy|difficult|容易|困难
sweet|bitter|甜|苦
first|last|第一|最后
win|lose|赢|输
buy|sell|买|卖
begin|end|开始|结束
love|hate|爱|恨
war|peace|战争|和平
young|old|年轻|年老
heavy|light|重|轻
front|back|前|后
brave|afraid|勇敢|害怕
""")
OPPOSITES += [{"x": o["y"], "y": o["x"], "zx": o["zy"], "zy": o["zx"]} for o in OPPOSITES if o["y"] not in ("old", "light")]
topic("opposite", "en",
      "What is the opposite of {x}? | Opposite of {x}? | What's the opposite of {x}? | Tell me the opposite of {x}. | The opposite of {x} is? | "
      "What word is the opposite of {x}? | Which word means the opposite of {x}?",
      "{Y}.", "The opposite of {x} is {y}. You are good with words! 🔤 | It's {y}! Want to try another one? 😄 | That would be {y}. Fun question! 😊",
      OPPOSITES, "And {x}? | What about {x}?", weight=1.2)
topic("opposite", "zh",
      "{zx}的反义词是什么？ | {zx}的反义词？ | 什么是{zx}的反义词？ | {zx}的反义词是？ | {zx}反过来是什么？ | {zx}的对立面是什么？ | 请说出{zx}的反义词。",
      "{zy}。", "{zx}的反义词是{zy}，你真爱动脑筋！🔤 | 是{zy}哦！还想再来一个吗？😄 | 答案是{zy}，真有趣！😊",
      OPPOSITES, "那{zx}呢？ | {zx}呢？", weight=1.2)

SOUNDS = table("a s za zs i", """
cow|Moo|牛|哞|🐮
cat|Meow|猫|喵|🐱
dog|Woof|狗|汪汪|🐶
sheep|Baa|羊|咩|🐑
duck|Quack|鸭子|嘎嘎|🦆
pig|Oink|猪|哼哼|🐷
frog|Ribbit|青蛙|呱呱|🐸
lion|Roar|狮子|吼|🦁
snake|Hiss|蛇|嘶嘶|🐍
bee|Buzz|蜜蜂|嗡嗡|🐝
bird|Tweet|小鸟|叽叽|🐦
mouse|Squeak|老鼠|吱吱|🐭
rooster|Cock-a-doodle-doo|公鸡|喔喔|🐓
""")
topic("sound", "en", "What does the {a} say? | What sound does a {a} make? | How does a {a} sound? | What noise does a {a} make? | Which sound do you hear from a {a}?",
      "{s}.", "The {a} says: {s}! Can you do it too? {i} | {s}! That's what a {a} says. {i} | {s}, {s}! What a funny {a}! {i}", SOUNDS, "And a {a}? | And the {a}?", weight=0.9)
topic("sound", "zh", "{za}怎么叫？ | {za}是怎么叫的？ | {za}的叫声是什么？ | {za}会怎么叫？ | 学一下{za}叫。",
      "{zs}。", "{za}是{zs}地叫，你也来学一学！{i} | {zs}！{za}就是这样叫的。{i} | {zs}，{zs}！好可爱的{za}！{i}", SOUNDS, "那{za}呢？", weight=0.9)
BABIES = table("a b za zb i", """
dog|a puppy|狗|小狗|🐶
cat|a kitten|猫|小猫|🐱
cow|a calf|牛|小牛|🐮
horse|a foal|马|小马|🐴
sheep|a lamb|羊|羊羔|🐑
pig|a piglet|猪|小猪|🐷
chicken|a chick|鸡|小鸡|🐤
duck|a duckling|鸭子|小鸭|🦆
frog|a tadpole|青蛙|蝌蚪|🐸
bear|a cub|熊|小熊|🐻
goat|a kid|山羊|小山羊|🐐
goose|a gosling|鹅|小鹅|🪿
""")
topic("baby", "en", "What is a baby {a} called? | What do you call a baby {a}? | What's the name for a young {a}? | A baby {a} is called? | How is a baby {a} called?",
      "{B}.", "A baby {a} is called {b}, so cute! {i} | {B}! Tiny and sweet. {i} | That's {b}. Don't you just love them? {i}", BABIES, weight=0.5)
topic("baby", "zh", "{za}的宝宝叫什么？ | 小时候的{za}叫什么？ | {za}的孩子叫什么？ | 刚出生的{za}叫什么？ | {za}的幼崽叫什么？",
      "{zb}。", "{za}的宝宝叫{zb}，太可爱啦！{i} | 是{zb}哦，小小的真萌！{i} | 叫{zb}呀，你喜欢吗？{i}", BABIES, weight=0.5)
LEGS = table("a n za i", """
dog|4|狗|🐶
cat|4|猫|🐱
horse|4|马|🐴
bird|2|鸟|🐦
duck|2|鸭子|🦆
chicken|2|鸡|🐔
spider|8|蜘蛛|🕷️
ant|6|蚂蚁|🐜
bee|6|蜜蜂|🐝
butterfly|6|蝴蝶|🦋
snake|0|蛇|🐍
fish|0|鱼|🐟
cow|4|牛|🐮
pig|4|猪|🐷
elephant|4|大象|🐘
octopus|8|章鱼|🐙
crab|10|螃蟹|🦀
person|2|人|🧍
""")
topic("legs", "en", "How many legs does a {a} have? | How many legs has a {a}? | Legs of a {a}? | A {a} has how many legs? | Count the legs of a {a}.",
      "{n}.", "A {a} has {n} legs. Well counted! {i} | It has {n}! Isn't nature amazing? {i} | {n} legs for a {a}! {i}", LEGS, "And a {a}?", weight=0.6)
topic("legs", "zh", "{za}有几条腿？ | {za}几条腿？ | 一只{za}有多少条腿？ | {za}有多少条腿？ | 数一数{za}有几条腿。",
      "{n}。", "{za}有{n}条腿，大自然真神奇！{i} | 是{n}条哦！{i} | {n}条腿，你数对了吗？{i}", LEGS, "那{za}呢？", weight=0.6)

SIZES = "ant bee mouse frog bird duck cat dog sheep lion horse elephant whale".split()
ZH_SIZES = "蚂蚁 蜜蜂 老鼠 青蛙 小鸟 鸭子 猫 狗 羊 狮子 马 大象 鲸鱼".split()
PAIRS = [(i, j) for i in range(len(SIZES)) for j in range(len(SIZES)) if i != j]
topic("bigger", "en", "Which is bigger, {a} or {b}? | What is bigger: {a} or {b}? | Is {a} or {b} bigger? | {A} or {b}, which one is bigger? | Who is bigger, {a} or {b}?",
      "The {v}.", "The {v} is bigger, of course! 📏 | The {v}! But size isn't everything. 😄 | It's the {v}. Every animal is great! 😊",
      [{"a": an(SIZES[i]), "b": an(SIZES[j]), "v": SIZES[max(i, j)]} for i, j in PAIRS], weight=0.8, computed=True)
topic("bigger", "zh", "{za}和{zb}哪个大？ | {za}跟{zb}谁更大？ | {za}大还是{zb}大？ | {za}和{zb}，哪个更大？ | 比一比，{za}和{zb}谁大？",
      "{zv}。", "当然是{zv}更大啦！📏 | {zv}！不过大小不重要，都很可爱。😄 | 是{zv}哦，每种动物都很棒！😊",
      [{"za": ZH_SIZES[i], "zb": ZH_SIZES[j], "zv": ZH_SIZES[max(i, j)]} for i, j in PAIRS], weight=0.8, computed=True)

# ------------------------------------------------------------------------------------------------------------------ numbers

SUMS = [{"x": str(x), "y": str(y), "v": str(x + y)} for x in range(21) for y in range(21)]
DIFFERENCES = [{"x": str(x), "y": str(y), "v": str(x - y)} for x in range(21) for y in range(x + 1)]
PRODUCTS = [{"x": str(x), "y": str(y), "v": str(x * y)} for x in range(11) for y in range(11)]
for name, slots, sign, en, zh in [("plus", SUMS, "+", "plus", "加"), ("minus", DIFFERENCES, "-", "minus", "减"), ("times", PRODUCTS, "*", "times", "乘")]:
    topic(name, "en",
          f"What is {{x}} {en} {{y}}? | {{x}} {sign} {{y}} | {{x}} {en} {{y}}? | What is {{x}} {sign} {{y}}? | {{x}}{sign}{{y}}=? | Calculate {{x}} {en} {{y}}. | "
          f"How much is {{x}} {sign} {{y}}? | {{x}} {en} {{y}} is? | Can you work out {{x}} {en} {{y}}?",
          "{v}.", f"{{x}} {en} {{y}} is {{v}}. Maths is fun! 🧮 | It's {{v}}! You can always count on me. 😄 | That makes {{v}}. Great practice! 💪",
          slots, f"And {{x}} {en} {{y}}? | And {{x}} {sign} {{y}}?", weight=1.1, computed=True)
    topic(name, "zh",
          f"{{x}}{zh}{{y}}等于几？ | {{x}}{sign}{{y}}等于多少？ | {{x}}{zh}{{y}}等于多少？ | {{x}}{zh}{{y}}是多少？ | 算一下{{x}}{sign}{{y}} | {{x}}{sign}{{y}}是几？ | 请计算{{x}}{zh}{{y}}。",
          "{v}。", f"{{x}}{zh}{{y}}等于{{v}}，算数真有趣！🧮 | 是{{v}}哦！算数找我就对啦。😄 | 等于{{v}}，继续加油练习！💪",
          slots, f"那{{x}}{zh}{{y}}呢？", weight=1.1, computed=True)
topic("next_number", "en", "What comes after {x}? | What number comes after {x}? | Which number is next after {x}? | After {x} comes? | What follows {x}?",
      "{v}.", "After {x} comes {v}. Counting with you is fun! 🔢 | It's {v}! 😄 | {v}! You are doing great. 💪",
      [{"x": str(x), "v": str(x + 1)} for x in range(100)], weight=0.6, computed=True)
topic("next_number", "zh", "{x}后面是几？ | {x}的下一个数是几？ | {x}之后是什么数？ | {x}后面的数是多少？ | 数到{x}，接下来是几？",
      "{v}。", "{x}后面是{v}，和你一起数数真开心！🔢 | 是{v}哦！😄 | {v}！你真棒。💪",
      [{"x": str(x), "v": str(x + 1)} for x in range(100)], weight=0.6, computed=True)
NUMBERS = [{"x": str(x), "y": str(y), "v": str(max(x, y))} for x in range(0, 31) for y in range(0, 31) if x != y]
topic("larger", "en", "Which is bigger, {x} or {y}? | Which number is larger, {x} or {y}? | Is {x} or {y} more? | {x} or {y}, which is more? | What is the larger one of {x} and {y}?",
      "{v}.", "{v} is the bigger one! 🔢 | It's {v}! Nice and simple. 😄 | {v} is more. Good question! 😊", NUMBERS, weight=0.5, computed=True)
topic("larger", "zh", "{x}和{y}哪个大？ | {x}大还是{y}大？ | {x}和{y}哪个数更大？ | {x}跟{y}比，哪个大？ | {x}和{y}里面大的是哪个？",
      "{v}。", "{v}更大哦！🔢 | 是{v}！很简单吧。😄 | 大的是{v}，问得好！😊", NUMBERS, weight=0.5, computed=True)

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
ZH_DAYS = [f"星期{d}" for d in "一二三四五六日"]
MONTHS = "January February March April May June July August September October November December".split()
ZH_MONTHS = [f"{n}月" for n in "一 二 三 四 五 六 七 八 九 十 十一 十二".split()]
LENGTHS = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
cycle = lambda names, zh: [{"x": names[i], "v": names[(i + s) % len(names)], "zx": zh[i], "zv": zh[(i + s) % len(names)],
                            "w": w, "zw": zw} for i in range(len(names)) for s, w, zw in [(1, "after", "后"), (-1, "before", "前")]]
topic("day", "en", "What day comes {w} {x}? | Which day is {w} {x}? | What is the day {w} {x}? | The day {w} {x} is? | Tell me the day that comes {w} {x}.",
      "{v}.", "The day {w} {x} is {v}. I hope it's a good one! 📅 | It's {v}! Any nice plans? 😊 | {v}! Every day is a gift. 🌞", cycle(DAYS, ZH_DAYS), "And {w} {x}?", weight=0.8)
topic("day", "zh", "{zx}的{zw}一天是星期几？ | {zx}{zw}一天是什么？ | {zx}{zw}面是星期几？ | {zx}的{zw}一天是？ | 哪一天在{zx}{zw}面？ | {zx}的{zw}面是哪天？ | 哪天在{zx}的{zw}面？",
      "{zv}。", "{zx}的{zw}一天是{zv}，祝你有个好心情！📅 | 是{zv}哦！有什么安排吗？😊 | {zv}！每天都值得期待。🌞", cycle(DAYS, ZH_DAYS), weight=0.8)
topic("month", "en", "What month comes {w} {x}? | Which month is {w} {x}? | What is the month {w} {x}? | The month {w} {x} is? | Tell me the month that comes {w} {x}.",
      "{v}.", "The month {w} {x} is {v}. Time flies! 📅 | It's {v}! 😊 | {v}! Something to look forward to. 🌸", cycle(MONTHS, ZH_MONTHS), "And {w} {x}?", weight=0.8)
topic("month", "zh", "{zx}的{zw}一个月是几月？ | {zx}{zw}面是几月？ | {zx}{zw}一个月是？ | {zx}的{zw}一个月是哪个月？ | 哪个月在{zx}{zw}面？",
      "{zv}。", "{zx}的{zw}一个月是{zv}，时间过得真快！📅 | 是{zv}哦！😊 | {zv}！很值得期待呢。🌸", cycle(MONTHS, ZH_MONTHS), weight=0.8)
MONTH_DAYS = [{"x": m, "zx": z, "n": str(n)} for m, z, n in zip(MONTHS, ZH_MONTHS, LENGTHS)]
topic("month_days", "en", "How many days are in {x}? | How many days does {x} have? | {x} has how many days? | Days in {x}? | How long is {x}?",
      "{n}.", "{x} has {n} days. Make them count! 📅 | It has {n}! 😊 | {n} days, and each one can be lovely. 🌞", MONTH_DAYS, "And {x}?", weight=0.6)
topic("month_days", "zh", "{zx}有多少天？ | {zx}有几天？ | {zx}一共多少天？ | {zx}多少天？ | {zx}总共有几天？",
      "{n}天。", "{zx}有{n}天，好好享受吧！📅 | 有{n}天哦！😊 | {n}天，每一天都很珍贵。🌞", MONTH_DAYS, "那{zx}呢？", weight=0.6)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
topic("letter", "en", "What letter comes after {x}? | Which letter is after {x}? | Next letter after {x}? | In the alphabet, what comes after {x}? | Tell me the letter after {x}.",
      "{v}.", "After {x} comes {v}. You know your ABC! 🔤 | It's {v}! 😄 | {v}! Well done for asking. 😊", [{"x": a, "v": b} for a, b in zip(LETTERS, LETTERS[1:])], weight=0.5)

# -------------------------------------------------------------------------------------------------------------------- facts
# One fact a paragraph: English and Chinese phrasings, the curt answers, the warm answers.

FACTS = """
How many days are in a week? | How many days does a week have? | Days in a week? | A week has how many days?
7. | A week has 7 days, and each one is a new chance! 📅 | 7 days! Which one do you like most? 😊
一周有几天？ | 一个星期有多少天？ | 一周多少天？ | 一星期有几天？
7天。 | 一周有7天，每天都是新的开始！📅 | 7天哦，你最喜欢哪一天？😊

How many months are in a year? | How many months does a year have? | Months in a year? | A year has how many months?
12. | A year has 12 months, full of surprises! 📅 | 12! Which month is your favourite? 😊
一年有几个月？ | 一年有多少个月？ | 一年几个月？ | 一年总共多少月？
12个月。 | 一年有12个月，每个月都有惊喜！📅 | 12个月哦，你最喜欢哪个月？😊

How many hours are in a day? | How many hours does a day have? | Hours in a day? | A day has how many hours?
24. | A day has 24 hours. Save some for a rest! ⏰ | 24! I hope they are happy ones. 😊
一天有多少小时？ | 一天有几个小时？ | 一天多少个小时？ | 一天总共几小时？
24小时。 | 一天有24小时，记得留点时间休息！⏰ | 24小时哦，祝你每一刻都开心。😊

How many minutes are in an hour? | How many minutes does an hour have? | Minutes in an hour? | An hour has how many minutes?
60. | An hour has 60 minutes. Take one to breathe! ⏰ | 60! Time flies when we talk. 😊
一小时有多少分钟？ | 一个小时有几分钟？ | 一小时多少分钟？ | 一小时等于多少分钟？
60分钟。 | 一小时有60分钟，时间过得真快！⏰ | 60分钟哦，和你聊天很开心。😊

How many seconds are in a minute? | Seconds in a minute? | A minute has how many seconds? | How many seconds does a minute have?
60. | A minute has 60 seconds. Enough for a big smile! ⏰ | 60! Quick, isn't it? 😊
一分钟有多少秒？ | 一分钟有几秒？ | 一分钟多少秒？ | 一分钟等于多少秒？
60秒。 | 一分钟有60秒，够笑一笑啦！⏰ | 60秒哦，很快吧？😊

How many days are in a year? | How many days does a year have? | Days in a year? | A year has how many days?
365. | A year has 365 days. I wish you many sunny ones! ☀️ | 365! So many chances to smile. 😊
一年有多少天？ | 一年有几天？ | 一年多少天？ | 一年总共多少天？
365天。 | 一年有365天，愿你天天开心！☀️ | 365天哦，每天都要笑一笑。😊

What is the largest ocean? | Which ocean is the biggest? | What's the biggest ocean on earth? | Name the largest ocean.
The Pacific. | It's the Pacific, so wide and blue! 🌊 | The Pacific! Do you like the sea? 😊
最大的海洋是什么？ | 世界上最大的洋是哪个？ | 哪个大洋最大？ | 最大的大洋叫什么？
太平洋。 | 是太平洋，又宽又蓝！🌊 | 太平洋哦！你喜欢大海吗？😊

What is the highest mountain? | Which mountain is the highest? | What's the tallest mountain in the world? | Name the highest mountain.
Mount Everest. | It's Mount Everest, high up in the clouds! 🏔️ | Mount Everest! What a view that must be. 😊
最高的山是什么？ | 世界上最高的山是哪座？ | 哪座山最高？ | 世界最高峰叫什么？
珠穆朗玛峰。 | 是珠穆朗玛峰，高高地立在云里！🏔️ | 珠穆朗玛峰哦，风景一定很美。😊

What is the longest river? | Which river is the longest? | What's the longest river in the world? | Name the longest river.
The Nile. | It's the Nile, what a long journey! 🏞️ | The Nile! Would you like to see it? 😊
最长的河是什么？ | 世界上最长的河是哪条？ | 哪条河最长？ | 世界第一长河叫什么？
尼罗河。 | 是尼罗河，流过好多地方！🏞️ | 尼罗河哦，想去看看吗？😊

What is the largest animal? | Which animal is the biggest? | What's the biggest animal in the world? | Name the largest animal.
The blue whale. | It's the blue whale, a gentle giant! 🐋 | The blue whale! Amazing, isn't it? 😊
最大的动物是什么？ | 世界上最大的动物是哪种？ | 什么动物最大？ | 体型最大的动物叫什么？
蓝鲸。 | 是蓝鲸，温柔的大个子！🐋 | 蓝鲸哦，很神奇吧？😊

What is the fastest animal? | Which animal runs fastest? | What's the fastest land animal? | Name the fastest animal.
The cheetah. | It's the cheetah, quick as the wind! 🐆 | The cheetah! Nobody can catch it. 😊
跑得最快的动物是什么？ | 什么动物跑得最快？ | 哪种动物速度最快？ | 跑得最快的动物叫什么？
猎豹。 | 是猎豹，像风一样快！🐆 | 猎豹哦，谁也追不上它。😊

What is the tallest animal? | Which animal is the tallest? | What animal has the longest neck? | Name the tallest animal.
The giraffe. | It's the giraffe, with its lovely long neck! 🦒 | The giraffe! It sees everything from up there. 😊
最高的动物是什么？ | 什么动物最高？ | 哪种动物脖子最长？ | 个子最高的动物叫什么？
长颈鹿。 | 是长颈鹿，脖子长长的真可爱！🦒 | 长颈鹿哦，站得高看得远。😊

Who wrote Romeo and Juliet? | Who is the author of Romeo and Juliet? | Romeo and Juliet is by whom? | Who wrote Hamlet?
Shakespeare. | Shakespeare did! A story full of heart. 🎭 | That was Shakespeare. Do you like plays? 😊
罗密欧与朱丽叶是谁写的？ | 谁写了罗密欧与朱丽叶？ | 罗密欧与朱丽叶的作者是谁？ | 哈姆雷特是谁写的？
莎士比亚。 | 是莎士比亚，写得真动人！🎭 | 莎士比亚哦，你喜欢看戏吗？😊

Who wrote the poem Quiet Night Thoughts? | Who is the author of Quiet Night Thoughts? | Quiet Night Thoughts is by whom? | Which poet wrote Quiet Night Thoughts?
Li Bai. | Li Bai did! Such a beautiful poem. 🌙 | That was Li Bai. His words still shine. ✨
静夜思是谁写的？ | 谁写了静夜思？ | 静夜思的作者是谁？ | 床前明月光是谁写的？
李白。 | 是李白，多美的诗呀！🌙 | 李白哦，他的诗到今天还闪闪发光。✨

At what temperature does water boil? | When does water boil? | How hot is boiling water? | What is the boiling point of water?
100 degrees. | Water boils at 100 degrees. Careful, it's hot! ♨️ | At 100 degrees, perfect for a cup of tea! 🍵
水多少度烧开？ | 水的沸点是多少？ | 水几度沸腾？ | 水烧到多少度会开？
100度。 | 水到100度就开啦，小心烫哦！♨️ | 100度，正好泡杯茶！🍵

At what temperature does water freeze? | When does water freeze? | How cold is ice? | What is the freezing point of water?
0 degrees. | Water freezes at 0 degrees. Keep warm! ❄️ | At 0 degrees, time for a snowman! ⛄
水多少度结冰？ | 水的冰点是多少？ | 水几度会结冰？ | 水冷到多少度会变成冰？
0度。 | 水到0度就结冰啦，注意保暖哦！❄️ | 0度，可以堆雪人啦！⛄

What is water made of? | What is H2O? | What is the formula of water? | What's the chemical formula for water?
H2O. | Water is H2O. Drink plenty of it! 💧 | It's H2O, the most precious drink! 😊
水的化学式是什么？ | 水的分子式是什么？ | 水是由什么组成的？ | 水的化学式怎么写？
H2O。 | 水是H2O，记得多喝水哦！💧 | 是H2O，生命离不开它！😊

What is the closest star? | Which star is closest to us? | What star do we see by day? | Name the nearest star.
The sun. | It's the sun, and it shines for you! ☀️ | The sun! I hope it's out today. 😊
离我们最近的恒星是什么？ | 最近的恒星是哪颗？ | 白天能看到哪颗恒星？ | 离地球最近的恒星叫什么？
太阳。 | 是太阳，它每天为你发光！☀️ | 太阳哦，希望今天是晴天。😊

What planet do we live on? | Which planet is our home? | On what planet are we? | What's the name of our planet?
Earth. | We live on Earth, our beautiful home! 🌍 | Earth! Let's take good care of it. 💚
我们住在哪个星球？ | 我们生活在哪颗行星上？ | 人类住在什么星球上？ | 我们的星球叫什么？
地球。 | 我们住在地球，美丽的家园！🌍 | 地球哦，要好好爱护它！💚

What is the biggest planet? | Which planet is the largest? | What's the largest planet? | Name the biggest planet.
Jupiter. | It's Jupiter, a real giant! 🪐 | Jupiter! The sky is full of wonders. ✨
最大的行星是什么？ | 哪颗行星最大？ | 太阳系最大的行星是哪个？ | 最大的行星叫什么？
木星。 | 是木星，真是个大家伙！🪐 | 木星哦，星空真奇妙。✨

How many planets are there? | How many planets go around the sun? | Number of planets? | How many planets are in the solar system?
8. | There are 8 planets, and ours is the cosiest! 🪐 | 8! Do you like looking at the stars? ✨
太阳系有几颗行星？ | 一共有几颗行星？ | 有多少颗行星？ | 绕着太阳转的行星有几颗？
8颗。 | 一共8颗，我们的地球最温馨！🪐 | 8颗哦，你喜欢看星星吗？✨

How many continents are there? | How many continents does the world have? | Number of continents? | How many continents are on earth?
7. | There are 7 continents. So much to explore! 🌍 | 7! Which one would you visit? ✈️
世界上有几个大洲？ | 一共有几大洲？ | 地球上有多少个洲？ | 全世界有几个洲？
7个。 | 一共有7个大洲，等你去看看！🌍 | 7个哦，你想去哪个？✈️

How many letters are in the alphabet? | How many letters does English have? | Letters in the alphabet? | How many English letters are there?
26. | There are 26 letters, enough for every story! 🔤 | 26! From A to Z. 😄
英语有多少个字母？ | 英文字母有几个？ | 一共有多少个英文字母？ | 英语字母表有几个字母？
26个。 | 有26个，能写出好多故事！🔤 | 26个哦，从A到Z。😄

How many fingers do I have? | How many fingers does a person have? | Number of fingers? | How many fingers are on two hands?
10. | You have 10, give me five of them! ✋ | 10! Great for counting. 😄
人有几根手指？ | 我有几根手指？ | 一个人有多少根手指？ | 两只手一共几根手指？
10根。 | 有10根，来击个掌吧！✋ | 10根哦，数数正好用。😄

How many seasons are there? | How many seasons does a year have? | Number of seasons? | A year has how many seasons?
4. | There are 4 seasons, each with its own charm! 🍂 | 4! Which one do you love most? 🌸
一年有几个季节？ | 一年有多少个季节？ | 有几个季节？ | 一年分几季？
4个。 | 有4个季节，每个都很美！🍂 | 4个哦，你最爱哪个？🌸

What do bees make? | What does a bee make? | What do we get from bees? | Bees make what?
Honey. | Bees make honey, how sweet of them! 🍯 | Honey! Lovely on toast. 🐝
蜜蜂酿什么？ | 蜜蜂做什么？ | 我们从蜜蜂那里得到什么？ | 蜜蜂会酿出什么？
蜂蜜。 | 蜜蜂酿蜂蜜，甜甜的真好！🍯 | 蜂蜜哦，抹面包可香了。🐝

What do pandas eat? | What does a panda eat? | Food of pandas? | What do pandas like to eat?
Bamboo. | Pandas eat bamboo all day long, so cute! 🐼 | Bamboo! And they love naps, too. 😴
熊猫吃什么？ | 大熊猫吃什么？ | 熊猫爱吃什么？ | 熊猫喜欢吃啥？
竹子。 | 熊猫整天吃竹子，太可爱啦！🐼 | 竹子哦，吃饱了就睡觉。😴

What do rabbits eat? | What does a rabbit eat? | Food of rabbits? | What do rabbits like to eat?
Carrots. | Rabbits love carrots, crunch crunch! 🐰 | Carrots! And a little grass. 🥕
兔子吃什么？ | 小兔子吃什么？ | 兔子爱吃什么？ | 兔子喜欢吃啥？
胡萝卜。 | 兔子爱吃胡萝卜，咔嚓咔嚓！🐰 | 胡萝卜哦，还有一点青草。🥕

What do cats eat? | What does a cat eat? | Food of cats? | What do cats like to eat?
Fish. | Cats love fish, and a good cuddle! 🐱 | Fish! Give yours a treat from me. 🐟
猫吃什么？ | 小猫吃什么？ | 猫爱吃什么？ | 猫喜欢吃啥？
鱼。 | 猫咪最爱吃鱼，还爱撒娇！🐱 | 鱼哦，替我喂喂它吧。🐟

Where do fish live? | Where does a fish live? | Home of fish? | Where can I find fish?
In water. | Fish live in water, splash! 🐟 | In water! They swim so nicely. 💧
鱼生活在哪里？ | 鱼住在哪里？ | 鱼儿住哪儿？ | 鱼在哪里生活？
水里。 | 鱼生活在水里，游得真欢！🐟 | 在水里哦，自由自在的。💧

What comes after winter? | Which season comes after winter? | Next season after winter? | The season after winter is?
Spring. | After winter comes spring, with flowers and birds! 🌸 | Spring! Warm days are on their way. 🌷
冬天之后是什么季节？ | 冬天过后是什么？ | 冬天后面是哪个季节？ | 冬天的下一个季节是什么？
春天。 | 冬天之后是春天，花儿都开啦！🌸 | 春天哦，暖和的日子就要来了。🌷

What comes after summer? | Which season comes after summer? | Next season after summer? | The season after summer is?
Autumn. | After summer comes autumn, golden and calm! 🍂 | Autumn! Time for warm soup. 🍁
夏天之后是什么季节？ | 夏天过后是什么？ | 夏天后面是哪个季节？ | 夏天的下一个季节是什么？
秋天。 | 夏天之后是秋天，金灿灿的！🍂 | 秋天哦，凉爽又舒服。🍁

Which season is the coldest? | When is it coldest? | What is the coldest season? | In which season does it snow?
Winter. | It's winter, the time for hot chocolate! ❄️ | Winter! Keep yourself warm. 🧣
哪个季节最冷？ | 什么季节最冷？ | 一年中最冷的季节是什么？ | 哪个季节会下雪？
冬天。 | 是冬天，来杯热可可吧！❄️ | 冬天哦，记得穿暖一点。🧣

Which season is the hottest? | When is it hottest? | What is the hottest season? | Which season is the warmest?
Summer. | It's summer, the time for ice cream! 🍦 | Summer! Don't forget your hat. ☀️
哪个季节最热？ | 什么季节最热？ | 一年中最热的季节是什么？ | 哪个季节天气最热？
夏天。 | 是夏天，来个冰淇淋吧！🍦 | 夏天哦，记得防晒。☀️

When is Christmas? | In which month is Christmas? | What month is Christmas in? | Christmas is in which month?
In December. | Christmas is in December. Ho ho ho! 🎄 | In December! What do you wish for? 🎁
圣诞节在几月？ | 圣诞节是几月？ | 圣诞节是什么时候？ | 几月过圣诞节？
十二月。 | 圣诞节在十二月，叮叮当！🎄 | 十二月哦，你想要什么礼物？🎁

What do you eat at the Mid-Autumn Festival? | What is eaten at the Mid-Autumn Festival? | Food of the Mid-Autumn Festival? | Which cake belongs to the Mid-Autumn Festival?
Mooncakes. | Mooncakes, under a big round moon! 🥮 | Mooncakes! I wish you a happy family dinner. 🌕
中秋节吃什么？ | 中秋吃什么？ | 中秋节要吃什么？ | 过中秋节吃啥？
月饼。 | 吃月饼，赏圆圆的月亮！🥮 | 月饼哦，祝你阖家团圆。🌕

What do you use to see? | What do we see with? | Which part of the body sees? | With what do I see?
Eyes. | With your eyes, and yours surely sparkle! 👀 | Your eyes! Give them a rest now and then. 😊
我们用什么看东西？ | 用什么看？ | 身体哪个部分用来看？ | 人靠什么看东西？
眼睛。 | 用眼睛呀，要好好保护哦！👀 | 眼睛哦，记得多休息。😊

What do you use to hear? | What do we hear with? | Which part of the body hears? | With what do I hear?
Ears. | With your ears, great for music! 👂 | Your ears! What song do you like? 🎵
我们用什么听声音？ | 用什么听？ | 身体哪个部分用来听？ | 人靠什么听声音？
耳朵。 | 用耳朵呀，可以听好听的音乐！👂 | 耳朵哦，你喜欢什么歌？🎵

What falls from the sky in winter? | What is white and cold? | What do you make a snowman of? | What is a snowman made of?
Snow. | Snow! Let's build a snowman. ⛄ | It's snow, soft and white! ❄️
冬天天上会下什么？ | 什么东西又白又冷？ | 雪人是用什么做的？ | 堆雪人用什么？
雪。 | 是雪呀，一起堆雪人吧！⛄ | 雪哦，又软又白！❄️

Is the earth round? | Is the earth flat or round? | What shape is the earth? | Which shape does the earth have?
Round. | The earth is round, like a big ball! 🌍 | Round! You could walk all around it. 😄
地球是圆的吗？ | 地球是什么形状？ | 地球是圆的还是平的？ | 地球长什么样？
圆的。 | 地球是圆的，像个大球！🌍 | 圆的哦，可以绕着走一圈。😄

How many sides does a triangle have? | Sides of a triangle? | A triangle has how many sides? | How many corners does a triangle have?
3. | A triangle has 3 sides. Neat! 🔺 | 3! Simple and strong. 😊
三角形有几条边？ | 三角形几条边？ | 三角形有多少条边？ | 三角形有几个角？
3。 | 三角形有3条边，又稳又好看！🔺 | 3哦，很简单吧。😊

How many sides does a square have? | Sides of a square? | A square has how many sides? | How many corners does a square have?
4. | A square has 4 sides, all the same! 🟦 | 4! Nice and even. 😊
正方形有几条边？ | 正方形几条边？ | 正方形有多少条边？ | 正方形有几个角？
4。 | 正方形有4条边，都一样长！🟦 | 4哦，整整齐齐的。😊
"""


def paragraphs(name, text, weight):
    """Topics without slots, one a paragraph of four lines; the first answer is the curt one."""
    for number, paragraph in enumerate(text.strip().split("\n\n")):
        en, en_answers, zh, zh_answers = paragraph.splitlines()
        for lang, asks, answers in [("en", en, en_answers), ("zh", zh, zh_answers)]:
            curt, warm = answers.split(" | ", 1)
            topic(f"{name}_{number}", lang, asks, curt, warm, weight=weight)


paragraphs("fact", FACTS, 0.8)
