"""Use a seeded grammar to generate titles that resemble the titles of a technology news page.

The grammar needs neither a network nor a file. Each title has a topic. The words of a title come from the
topic's word lists and from general word lists. Most words are drawn by rank, following Zipf's law. Other
words come from a short list of favorites of the preceding word, so that a model can learn dependencies
between words. Names and rare words are built from syllables, so the vocabulary grows with the number of
titles. The statistics of the generated titles are similar to those of real titles, but no word or rule is
copied from a real title.

The titles are always generated in the same order, so titles(4) starts with the three titles of titles(3).

The generated titles are the same on every machine. The random numbers are the raw output of PCG64, which
numpy guarantees to be stable, and all arithmetic on the random numbers is exact. The code avoids libm
functions, hash() and iteration over sets, because their results can differ between machines or processes.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import accumulate
from math import fsum
from operator import mul
from typing import Any

import numpy as np

SEED = 20_070_219

# Each topic has five word lists: nouns, mass nouns, verbs, adjectives, and endings of product names. Each
# list begins with its most frequent words. In nouns, "-" stands for a space.
TOPICS = """
compiler function type macro parser pointer closure module runtime library debugger linter interpreter
  exception generic iterator loop string array struct interface decorator thread lambda variable operator
  package snippet keyword; code syntax recursion concurrency memory inheritance bytecode refactoring;
  compile parse refactor debug optimize rewrite port lint inline annotate embed; functional static dynamic
  lazy typed imperative concurrent recursive immutable idiomatic strict; script lang c lisp ml
browser page website framework component form stylesheet cookie extension bookmark selector tab plugin
  template font layout widget animation router server request endpoint header proxy cache frontend client
  crawler bundle; html css javascript rendering markup traffic accessibility hosting; render load scrape
  bundle minify embed serve cache style host scroll; responsive static reactive client-side server-side fast
  lightweight accessible semantic bloated broken; web js kit ui page
database query index table schema row column join transaction replica shard key view record store backend
  warehouse pipeline dashboard spreadsheet cursor lock log snapshot migration partition document graph
  engine; sql data consistency replication durability storage throughput analytics; query index replicate
  shard migrate aggregate store sync partition join insert; relational distributed columnar transactional
  embedded key-value in-memory time-series consistent durable append-only; db base store data grid
model network neuron classifier dataset layer transformer embedding agent chatbot benchmark gradient prompt
  label feature tensor weight algorithm prediction kernel cluster loss token policy reward vector image
  voice translator; ai inference training learning attention backpropagation regression overfitting; train
  fine-tune predict classify label generate learn detect distill prune evaluate; deep neural generative
  supervised convolutional recurrent open-source multimodal biased adversarial sparse; ai net brain mind gpt
vulnerability password exploit attacker hacker breach backdoor patch certificate key firewall worm botnet
  payload token hash cipher phish leak researcher bounty signature sandbox honeypot ransom rootkit
  credential audit session; malware ransomware encryption authentication security phishing cryptography
  spyware; exploit patch encrypt hack leak steal breach authenticate audit bypass scan; vulnerable malicious
  encrypted secure critical zero-day compromised remote stolen insecure anonymous; sec lock vault guard
  shield
startup founder investor company accelerator pitch customer valuation round seed idea mentor cofounder
  market deal term pivot exit unicorn team venture angel landing incubator competitor deck prototype
  side-project newsletter; funding growth equity traction revenue churn pricing marketing; launch pitch fund
  raise bootstrap pivot acquire validate sell monetize grow; early-stage bootstrapped profitable lean viral
  solo pre-seed venture-backed failed recurring overnight; labs hub io ly flow
chip processor keyboard board laptop circuit sensor battery transistor monitor printer cable cpu gpu router
  camera device adapter motherboard drive disk mouse speaker amplifier connector display antenna fan
  oscillator; silicon hardware firmware soldering ram bandwidth cooling power; solder overclock repair
  assemble power boot charge design cool benchmark tape-out; analog mechanical wireless portable vintage
  8-bit low-power open-source modular quad-core retro; chip board tron pad book
game player level engine console arcade puzzle sprite score pixel character boss map dungeon quest
  tournament controller emulator card board dice achievement maze speedrun cheat shooter platformer
  simulator mod; gameplay physics multiplayer storytelling worldbuilding rendering esports nostalgia; play
  beat design render emulate port mod simulate speedrun explore level; multiplayer retro turn-based
  procedural text-based addictive playable pixelated isometric old-school massively-multiplayer; games play
  quest craft verse
rocket satellite planet moon asteroid telescope orbit launch astronaut galaxy star comet probe rover crater
  spacecraft booster lander black-hole station mission nebula capsule meteorite spacesuit exoplanet
  supernova eclipse payload; gravity space dark-matter radiation propulsion debris microgravity dust; launch
  orbit land discover detect explore map observe photograph collide explode; interstellar lunar solar cosmic
  distant reusable habitable martian supermassive rocky faint; space sat orbit astro nova
gene cell protein virus vaccine bacterium mouse antibody mutation species enzyme organism brain trial drug
  embryo patient tumor fossil bird whale insect octopus neuron chromosome genome microbe fungus parasite;
  dna crispr evolution cancer immunity sequencing biology malaria; sequence infect mutate evolve cure clone
  treat vaccinate survive edit regenerate; genetic viral clinical rare bacterial extinct synthetic cellular
  immune contagious endangered; bio gen cell therapeutics med
reactor battery turbine grid forest ocean glacier storm drought emission panel pipeline flood wildfire river
  farm species coral plant hurricane tax target fuel utility island coast village heatwave windmill; climate
  carbon energy solar wind oil coal pollution; warm melt burn recycle store power capture ban plant
  phase-out generate; renewable nuclear green fossil-fuel carbon-neutral geothermal offshore toxic warmer
  arctic sustainable; energy solar power green terra
law court judge lawsuit government senator bill election patent copyright regulator ruling vote party
  minister trial tax protest agency license treaty appeal sanction fine campaign candidate senate policy
  lawyer; censorship antitrust net-neutrality democracy corruption legislation immigration transparency; ban
  sue fine rule vote regulate propose block seize approve overturn; federal legal illegal political
  unconstitutional bipartisan supreme foreign democratic controversial proposed; gov civic policy law union
coin blockchain wallet bank token exchange miner loan payment trader ledger smart-contract fund card bubble
  hedge-fund investor currency bond transaction account mortgage scam fee crash regulator fork credit stock;
  bitcoin ethereum money cash crypto inflation mining trading; trade mine invest pay lend borrow transfer
  crash steal launder hodl; decentralized financial volatile digital peer-to-peer illiquid algorithmic
  fraudulent wealthy fiat unbanked; coin pay chain fin swap
job developer manager interview engineer resume team salary office meeting employee recruiter remote-worker
  boss career freelancer contractor candidate raise standup deadline commute coworker promotion hire
  whiteboard-interview offer cubicle week; work productivity burnout hiring management overtime leadership
  retirement; hire quit interview manage work negotiate promote fire mentor commute estimate; remote
  full-time senior technical productive underpaid four-day freelance toxic flexible burned-out; work team
  hire desk talent
doctor patient hospital diet drug meal vitamin pill restaurant recipe disease insurer disorder nurse surgeon
  dose symptom addict heart body runner gym habit dentist chef bacteria kitchen farm fruit; sleep coffee
  sugar exercise meditation obesity alcohol fasting; eat drink sleep treat cook exercise diagnose prescribe
  fast smoke lose; healthy chronic mental low-carb vegan medical fatal organic sugary sleepless psychedelic;
  health care fit well food
artist font logo color painting book novel designer photo photographer sketch pattern essay poem film song
  icon typeface palette writer story album instrument piano guitar museum poster camera portrait; design
  music art typography writing photography drawing architecture; design draw paint write compose sketch
  illustrate play sculpt publish record; beautiful minimalist visual creative handmade abstract flat ugly
  surreal musical generative; studio design press canvas pixel
city car train bike road street house bus airport bridge plane driver commuter subway parking-lot tenant
  landlord building apartment suburb scooter airline pilot intersection sidewalk elevator highway
  traffic-light neighborhood; traffic housing transit zoning transportation congestion gentrification
  cycling; build drive ride rent fly park commute crash widen ban design; urban electric high-speed
  autonomous affordable pedestrian crowded walkable public empty dense; transit air motors ride rail
theorem proof number equation prime puzzle conjecture algorithm graph matrix set polynomial curve integral
  tree sequence function dimension paradox game knot problem polygon group lattice vector circle fractal
  tiling; geometry calculus algebra topology statistics combinatorics logic randomness; prove solve compute
  approximate factor generalize count visualize sort derive randomize; linear random prime infinite elegant
  exponential computable discrete geometric np-complete unsolved; math logic sigma theorem poly
post tweet video feed comment channel podcast journalist newspaper troll moderator thread meme influencer
  subreddit forum paywall headline reader story newsletter community follower platform algorithm article
  publisher bot photo; news media journalism misinformation clickbait moderation outrage spam; post share
  ban delete moderate publish subscribe stream comment follow block; social viral fake toxic online
  anonymous trending banned sponsored popular verified; media post feed news social
brain mind memory habit dream emotion child study bias decision personality illusion therapist relationship
  friend adult conversation question stranger mistake belief lie experience parent thought subject
  psychologist face smell; happiness loneliness empathy procrastination creativity intuition consciousness
  anxiety; think remember feel forget believe perceive procrastinate decide overcome explain trick;
  cognitive emotional social lonely creative irrational smart happy conscious anxious mindful; mind psych
  think self human
"""

# The general word lists: nouns, mass nouns, verbs and adjectives that belong to no topic.
GENERAL = """
way thing tool guide year problem system project idea list story world time day team life history reason
  person case future rule example part lesson interview place service question answer mistake version review
  introduction thought standard experiment alternative plan end change country group collection platform
  study home design business product community test resource state look note paper art trick secret kid
  number side step hour minute man woman name word view point choice cost line; software technology science
  people information help support access knowledge research progress culture advice fun experience success
  practice content performance quality; make build use get find create learn write start stop help see know
  think keep need want give work change lose show save fix add become try read understand turn share improve
  avoid say ask open choose explain leave watch move run handle replace test remove bring end kill face
  break hit hide set design; new best free good open simple great better big small old first real easy
  modern bad little top full next hard different own long high other short cool right real-time practical
  perfect local single wrong quick public complete powerful early late popular weird strange future
  interesting nice custom major dead
"""

# Lists of names, function words, syllables and irregular forms. "~" stands for a space inside a name.
WORDS = """
place: US China California India Europe London Germany New~York Japan Russia France Berlin Canada Africa
  Israel Texas Australia Iran Brazil Korea Paris Boston Seattle Sweden Mexico Norway Iceland Estonia Tokyo
  Switzerland Toronto Singapore Italy Spain Chicago Hong~Kong Finland Ukraine Ireland Turkey Chile Denmark
  Kenya Poland Egypt Vietnam Portugal Austin Oakland Nigeria Taiwan Cuba Antarctica Greece Peru Alaska
  Detroit Amsterdam Siberia Hungary Argentina Indonesia Hawaii
lang: Python JavaScript Rust Go Java C Ruby Haskell PHP C++ Swift Lisp Clojure Scala TypeScript Erlang
  Elixir Kotlin Perl Lua OCaml F# C# Scheme Julia R Zig Bash Prolog Fortran Elm Nim Smalltalk Forth COBOL
  Racket Ada D Pascal Assembly WebAssembly Tcl Dart Crystal APL SQL
first: John Alex Maria David Anna Peter Sam Linda James Robert Wei Elena Omar Julia Tom Nina Paul Sarah
  Marcus Ivan Priya Ken Laura Daniel Grace Max Eva Hugo Ravi Emma Leo Clara Victor Alice Bob Yuki Igor Ruth
  Felix Diana Carl Rosa Noah Mei Hans Tara Jonas Amir Chloe Oscar Ines Walter Sofia Kurt Lena Bruno
adverb: just now still already finally again really actually quietly slowly secretly officially simply
  faster literally nearly safely never probably better always easily accidentally remotely automatically
  manually effectively suddenly almost rarely publicly correctly
month: January February March April May June July August September October November December
known: API AI CEO IDE CLI SSH NSA PDF GUI USB FBI UI CSS HTML SQL NASA DNS AWS GPU CPU JSON EU UK VPN HTTP
  MIT IPO RSS VR XML SEO TV DIY GPS SDK FAQ OS SaaS FCC IBM IoT LLM CIA TLS REST LED PC IT HR NLP CRM MVP
  ORM RAM FTC PhD QR DRM ARM NFT LSD DOJ CDN
w: W S
d: 1 2 5 3 4 7 6 8 9 0
onset: b br c ch cl cr d dr f fl fr g gl gr h j k kl l m n p pl pr qu r s sc sh sk sl sn sp st str t th tr
  tw v w wh y z
vowel: a e i o u a e i o ai ea ee oo ou io ia
coda: b ck d g k l ll m n nd ng nt p r rd rk rn rt s sh ss st t th x z n r l s t
root: therm graph meter phon scop hydr photo geo chron path micr macr tele cycl phil log crat anthrop astr
  bibl carb cardi chem crypt derm dynam electr gastr gen gram heli hem lumin magn mech morph neur nov ocul
  opt oste ped pneum pod poly psych rhin scrib sect sens son spect stell struct tact tempor terr vac vert
  vis vit vol zo port duct flect ject mit pend pos press rupt scend tain tend tract vene vers voc mark stone
  field bridge wood light water house land hand back fire side foot head hill horse blood bird ball berry
  bell ridge glass storm salt sand wheel clock cloth corn cup drift dust eye fall fish frost gate hook
prefix: re un over under out sub super inter trans de dis pre post anti counter mis non auto bi tri semi pro
  con per
end_n: er or ion ist ism ation ment ness ity age ship ard let ling craft work line man way land top yard
  able ine ide ium oid ology graphy
end_m: ism ity ness ation ology ing ics age ium ship hood ance
end_v: ize ate ify en er le ow ect end ulate ish
end_a: ic al ous ive ary able ish less ful ian y ile ent ular esque
end_last: s son er ski man ov i ez a
ed: make:made build:built get:got find:found write:wrote see:saw know:knew think:thought keep:kept give:gave
  lose:lost become:became read:read understand:understood say:said choose:chose leave:left run:ran
  bring:brought break:broke hit:hit hide:hid set:set buy:bought sell:sold cut:cut beat:beat steal:stole
  hack:hacked spin:spun win:won draw:drew fly:flew drive:drove ride:rode rise:rose eat:ate drink:drank
  sleep:slept feel:felt forget:forgot teach:taught pay:paid lend:lent quit:quit fall:fell go:went
  overtake:overtook bend:bent spread:spread sink:sank overcome:overcame shut:shut show:showed split:split
  withdraw:withdrew rewrite:rewrote bind:bound breed:bred undo:undid reset:reset input:input put:put
  upset:upset
plurals: person:people man:men woman:women child:children mouse:mice bacterium:bacteria fungus:fungi
  life:lives index:indexes species:species matrix:matrices series:series foot:feet axis:axes
small: a an the of for in on to with and or by from at as via vs vs. is its
"""

# A rule has the form "rule: weight pattern | weight pattern ...". In a pattern, {x} stands for another rule,
# a list in WORDS, a name or an inflected word. The slots for names are called co, tool, person, last and
# coined. The slots for words are called n and ns (noun and plural), m (mass noun), v, vs, ved and ving
# (verb), and adj (adjective). The rule `more` adds a phrase if the title is still short. In a pattern, "_"
# stands for a space.
RULES = """
title: 52 {headline} | 13 {headline2} | 16 Ask HN: {ask} | 7 Show HN: {show} | 0.2 Tell HN: {S} | 0.15
  Launch HN: {co} (YC {w}{d}{d}) – {pitch} | 4 {short} | 5 {quoted} | 1.3 {S} [pdf] | 0.7 {headline} [video]
  | 5 {headline} ({past})
headline: 32 {S} | 4 {S} by {past} | 7 {howto} | 3 {NP} {prep} {anyNP} | 3 {NPs} {prep} {anyNP} {when} | 3
  {mass} {prep} {mass} | 9 {tool}: {pitch} | 9 {tool} – {pitch} | 5 {tool} {version} {released} {when} | 6
  {why} | 5 {question} | 5 {listicle} | 3 {ving} {obj} {when} | 3 {ving} {anyNP} {prep} {anyNP} | 3 {ving}
  {mass} with {techname} | 2 {person}, {appos} | 1 {tool}, {appos} | 3 {co}: {S} | 4 the {n} of {anyNP} | 2
  {imperative} | 3 {NPs} are {comp} than {NPs} | 3 {anyNP} {prep} {anyNP} | 3 {person}: {S} | 3 {person} on
  {topicthing} | 2 {S}, says {source} | 3 {S}, {source} says | 2 {techname} vs. {techname} | 1 {n} vs. {n} |
  3 {lifeof} | 2 {news} | 3 {intro}
headline2: 3 {topicthing}: {S} | 5 {clause} – {S} | 3 {NP}: {ving} {anyNP} | 3 {NP}: {NPs} and {NPs} | 2 {S}
  – {S} | 3 {howto}: {NP} | 2 {topicthing}, {topicthing} and {topicthing} | 2 {ving} {topicthing}, {ving}
  {topicthing}
S: 12 {clause}{more} | 2 {clause} {when} | 1 {clause} and {v} {obj} | 0.5 {clause}, {adverb} | 1 {adverb}
  {clause}
clause: 10 {co} {vs} {obj} | 6 {co} to {v} {obj} | 5 {co} is {ving} {obj} | 4 {co} {ved} {obj} | 4 {NP} {vs}
  {obj} | 6 {NPs} {v} {obj} | 4 {NPs} can {v} {obj} | 3 {NPs} that {v} {obj} | 2 {NP} that {vs} {obj} | 3
  {NPs} are {ving} {obj} | 2 {NPs} are {adj} | 3 {mass} is {adjx} | 2 {mass} is {ving} {obj} | 3 {place}
  {vs} {obj} | 2 {place} to {v} {obj} | 2 {place}'s {n} {vs} {obj} | 2 {co}'s {n} {vs} {obj} | 2 {acr} {vs}
  {obj} | 3 scientists find {obj} | 2 scientists {v} {obj} | 2 {person} {vs} {obj} | 1 {NP} {prep} {anyNP}
  {vs} {obj} | 2 {obj} {was} {ved} {bywhom} | 3 I {ved} {obj} | 2 We {ved} {obj} | 2 You {should} {v} {obj}
  | 2 {share} of {NPs} {v} {obj} | 2 {number} {ns} {ved} {prep} {place} | 2 {NPs} {v} {obj} to {v} {obj} | 2
  {co} wants to {v} {obj} | 1 It's {adj} to {v} {obj} | 2 The {n} that {ved} {obj} | 1 When {NPs} {v} {obj}
  | 2 The {adj} {n} of {ving} {obj} | 2 {ving} {obj} is {adjx} | 1 {NPs} and {NPs} {v} {obj} | 1
  {number}-year-old {n} {vs} {obj}
obj: 1 {object}{more}
object: 6 {NP} | 7 {NPs} | 5 {mass} | 4 {co} | 2 {techname} | 2 its {ns} | 2 their {ns} | 3 {co}'s {ns} | 2
  {person}'s {n} | 2 your {ns} | 2 {money} {prep} {thing} | 1 {co}'s {n} | 1 {share} of {ns} | 1 {person} |
  1 how {NPs} {v} | 1 {n}/{n} {ns}
anyNP: 1 {thing}{more}
thing: 4 {NP} | 5 {NPs} | 6 {mass} | 2 {place} | 2 {techname} | 1.5 {co} | 1 {acr} | 1 your {n}
more: 12 _{prep} {thing}{more} | 3 _{when}{more} | 2 _and {thing} | 1 , but not {obj} | 2 _as {NPs} {v}
  {obj} | 1.5 _because {NPs} are {adj} | 2 _to {v} {obj} | 2 _that {vs} {obj} | 1.5 _by {ving} {obj} | 1
  _when {NPs} {v} {obj}
NP: 7 a {n} | 9 a {adj} {n} | 6 the {n} | 6 the {adj} {n} | 4 a {noun2} {n} | 3 the {noun2} {n} | 2 the
  {noun2} {n} of {mass} | 2 a {adj} {noun2} {n} | 2 this {n} | 2 {co}'s {n} | 2 {co} {n} | 2 {techname} {n}
  | 1 {acr} {n} | 2 my {n} | 2 the {sup} {n} | 2 a {adj} {n} of {mass} | 1 a {m}-{ved} {n} | 1 {lang}-based
  {n} | 3 the {n} of the {n} | 1 one of the {sup} {ns}
NPs: 10 {ns} | 10 {adj} {ns} | 8 {noun2} {ns} | 3 {adj} {noun2} {ns} | 2 {co} {ns} | 2 {place}'s {ns} | 1
  {acr} {ns} | 2 some of the {ns} | 2 {NPs} and {ns} | 1 {n}-{n} {ns} | 1 {adj} and {adj} {ns}
mass: 8 {m} | 4 {adj} {m} | 3 {noun2} {m} | 2 {m} and {m} | 0.3 {m} & {m} | 1 {acr} {m}
noun2: 6 {n} | 3 {m} | 1 {acr}
topicthing: 4 {mass} | 3 {ns} | 3 {adj} {ns} | 2 {techname} | 2 {n} {ns}
adjx: 5 {adj} | 2 not {adj} | 2 dead | 2 getting {comp} | 2 broken | 1 the new {m} | 1 overrated | 1 hard
comp: 4 more {adj} | 2 better | 1 less {adj} | 1 faster | 1 cheaper | 1 worse | 1 bigger
sup: 4 most {adj} | 2 best | 1 world's {adj} | 1 first | 1 largest | 1 worst | 1 oldest | 1 smallest
bywhom: 4 by {co} | 3 by {NPs} | 2 by {person} | 4 in {past} | 2 in {place} | 2 after {number} years
was: 2 was | 2 is being | 1 has been | 1 to be
should: 4 should | 2 can | 2 can't | 1 don't need to | 1 shouldn't | 1 must | 1 might
source: 3 study | 3 report | 2 researchers | 1 court | 2 {co} | 1 experts | 2 {co} CEO
when: 3 after {number} years | 3 in {place} | 2 in {past} | 2 for {money} | 1 since {past} | 1 this year | 1
  by 203{d} | 1 at {share} | 2 after {anyNP} | 2 with {anyNP} | 1 again | 1 without {mass} | 2 amid {mass}
prep: 10 for | 9 in | 7 with | 5 of | 3 from | 4 to | 3 on | 2 without | 2 and | 1 at | 1 by | 1 against | 1
  about | 1 behind | 1 through | 1 as | 1 under | 1 via | 1 over | 1 vs | 1 between | 1 near | 1 inside
howto: 7 How to {v} {obj} | 4 How {co} {vs} {obj} | 4 How I {ved} {obj} | 3 How we {ved} {obj} | 3 How {NPs}
  {v} {obj} | 2 How {co} {ved} {obj} | 1 How not to {v} {obj} | 2 How {mass} is {ving} {obj} | 2 How to {v}
  {obj} | 1 How {mass} works
why: 5 Why {co} {vs} {obj} | 4 Why {NPs} {v} {obj} | 3 Why I {ved} {obj} | 2 Why we {ved} {obj} | 3 Why you
  should {v} {obj} | 1 Why {NPs} are {adj} | 2 Why is {NP} so {adj}? | 2 Why do {NPs} {v} {obj}? | 2 Why I
  don't {v} {obj} | 1 Why does {co} {v} {obj}?
question: 4 Is {mass} {adjx}? | 3 Can {NPs} {v} {obj}? | 3 Should {NPs} {v} {obj}? | 3 What is {NP}? | 2
  What is {mass}? | 2 What are {NPs}? | 3 What if {NPs} {ved} {obj}? | 2 Do {NPs} {v} {obj}? | 2 Are {NPs}
  {adj}? | 2 Who {vs} {obj}? | 2 Is {co} {ving} {obj}? | 2 What {NPs} {v} | 2 What {co} {ved} | 1 Where are
  {NPs}? | 2 What I {ved} from {ving} {obj}
listicle: 4 {count} {ns} to {v} {obj} | 3 {count} {adj} {ns} | 3 {count} ways to {v} {obj} | 2 {count}
  things {NPs} {v} | 2 {count} reasons to {v} {obj} | 3 The {count} {adj} {ns} | 2 top {count} {ns} for
  {anyNP} | 2 {count} years of {mass} | 1 {count} {adj} {ns} of {past}
imperative: 3 Stop {ving} {obj} | 3 {v} your {ns} | 2 Let's {v} {obj} | 2 Don't {v} your {ns} | 2 Never {v}
  {obj} | 2 {adverb} {v} {obj}
appos: 4 the {n} that {vs} {obj} | 3 a {adj} {n} | 4 a {n} for {anyNP} | 2 the {adj} {n} | 2 {ved} by {co} |
  2 a {n} written in {lang} | 1 and why it {vs} | 2 or how to {v} {obj}
intro: 3 An introduction to {topicthing} | 2 A guide to {topicthing} | 1 A brief history of {topicthing} | 2
  Understanding {topicthing} | 1 The state of {topicthing} | 2 {topicthing} explained | 1 Introducing {tool}
  | 2 The future of {topicthing} | 1 The rise of {topicthing} | 1 The case against {topicthing} | 1 A tour
  of {tool} | 1 Beyond {topicthing}
lifeof: 3 My {n} with {topicthing} | 2 My {adj} {n} | 2 Lessons from {ving} {obj} | 2 What {number} years of
  {ving} {ns} taught me | 1 Confessions of a {n} | 2 Inside the {n} of {anyNP} | 2 The {n} behind {co} | 1
  I'm {ving} {obj}
news: 3 {co} raises {money} | 2 {co} raises {money} to {v} {obj} | 2 {co} acquires {co} | 2 {co} acquires
  {co} for {money} | 1 {co} {was} down | 2 {co} lays off {number} {ns} | 1 {co} hires {person} | 1 {co} Q{d}
  earnings
released: 6 released | 2 is out | 1 is now available | 1 beta | 1 with {mass} | 1 changelog | 1 and {tool}
  {version}
short: 5 {tool} | 4 {n} {n} | 5 {adj} {n} | 6 {adj} {ns} | 3 {m} | 3 {co} | 4 The {n} | 5 The {adj} {n} | 3
  {ving} {ns} | 2 {person} | 2 {last}'s {n} | 3 {m} and {m} | 2 the {n} {n} | 3 {n} of {m} | 1 {v} {ns} | 2
  {tool} {version}
quoted: 3 “{S}” | 1 "{S}" | 2 '{adj} {n}' {vs} {obj} | 1 ‘{S}’: {person} on {mass} | 2 “{n}” {prep} {anyNP}
  | 1 "{ns}": {NP}
show: 5 {tool} – {pitch} | 3 {tool}, {pitch} | 2 {tool}: {pitch} | 3 a {n} for {anyNP} | 3 I built a {adj}
  {n} | 3 I built a {n} to {v} {obj} | 2 {v} {obj} | 2 {v} {obj} with {techname} | 2 {adj} {ns} for {anyNP}
  | 1 {tool} ({pitch}) | 1 an open source {n}
ask: 5 What is the best way to {v} {obj}? | 3 What's the best {n} for {anyNP}? | 5 How do you {v} {obj}? | 3
  How to {v} {obj}? | 2 Best {n} for {anyNP}? | 3 Is it worth {ving} {obj}? | 3 Is there a {n} for {anyNP}?
  | 2 Is there a {adj} {n} that {vs} {obj}? | 3 Anyone {ving} {obj}? | 2 Any {adj} {ns} for {anyNP}? | 2
  Recommendations for {topicthing}? | 3 What {ns} do you {v}? | 2 What are your favorite {ns}? | 2 What are
  you {ving}? | 3 Why do {NPs} {v} {obj}? | 2 Should I {v} {obj}? | 2 Should I {v} {obj} or {v} {obj}? | 2
  Do you {v} {obj}? | 2 How did you {v} your first {n}? | 2 What happened to {topicthing}? | 2 Have you ever
  {ved} {obj}? | 2 Can I {v} {obj} without {ving} {obj}? | 2 {techname} or {techname} for {anyNP}? | 2 Who
  is {ving} {obj} ({month} 201{d})? | 2 I'm a {n}, how do I {v} {obj}? | 1 Looking for {ns} to {v} {obj} | 1
  What's your {n}? | 1 Does anyone {v} {obj}? | 2 How is {mass} in {place}? | 1 Are {NPs} {adj}? | 1 I {ved}
  {obj}. Now what? | 2 Where do you {v} {obj}? | 1 Feedback on my {n}?
acr: 5 {known} | 3 {coined} | 0.5 {coined}-{d}
techname: 5 {tool} | 7 {lang} | 2 {co} | 1 {lang} and {tool} | 1 {lang} {d}.{d} | 2 {acr}
pitch1: 8 a {n} for {anyNP} | 7 a {adj} {n} for {anyNP} | 6 {v} {obj} | 3 {v} {obj} {prep} {techname} | 4
  {adj} {ns} for {anyNP} | 4 a {n} written in {lang} | 3 {mass} for {NPs} | 3 open-source {n} for {anyNP} |
  3 {v} and {v} {obj} | 3 a {adj} {noun2} {n} | 2 the {adj} {n} | 2 a {lang} {n} for {ving} {obj} | 2 an
  alternative to {co} | 2 {n} as a service | 1 {co} for {NPs} | 1 free {adj} {n}
pitch: 8 {pitch1}{more} | 1.5 {pitch1} and {ns} | 1 {pitch1}, {ns} and {m} | 0.6 {pitch1} ({m}/{m}) | 1
  {adj} {pitch1}{more} | 1.5 {pitch1}, with {mass}
past: 10 201{d} | 8 202{d} | 5 200{d} | 3 19{d}{d} | 0.5 18{d}{d}
share: 6 {d}{d}% | 1 {d}% | 1 {d}.{d}% | 1 one in {d}
money: 3 ${d}M | 3 ${d}{d}M | 2 ${d}.{d}B | 1 ${d}B | 1 ${d}{d}{d} | 1 ${d},000 | 1 €{d}{d}M | 1 ${d}{d}K
version: 5 {d}.0 | 6 {d}.{d} | 2 v{d}.{d} | 3 {d}.{d}.{d} | 3 {d} | 2 0.{d} | 1 {d}{d}
count: 2 {d} | 3 {d}{d} | 2 10 | 1 5 | 1 three | 1 five | 1 seven | 1 two
number: 4 {d} | 4 {d}{d} | 2 {d}00 | 2 {d},{d}00 | 1 {d}M | 1 {d}k | 2 two | 1 three | 1 a million | 1
  {d}{d}0,000
"""

# -- probabilities, which are fitted to the statistics of real titles

FAVOURED = 0.16  # the fraction of words that come from the favorites of the preceding word
GENERAL_SHARE = 0.35  # the fraction of words that belong to no topic
RARE = {"n": 0.29, "m": 0.24, "v": 0.2, "a": 0.29}  # the fraction of words that are built from syllables
SHIFT = 24  # a word of rank r has the weight 1 / (r + SHIFT)
# The fraction of names that belong to no topic, for each kind of name.
KNOWN = {"co": 0.5, "tool": 0.15, "person": 0.3, "last": 0.3, "coined": 0.3}
# The probability of each octave of ranks, divided by the probability of the next lower octave. An octave
# consists of the ranks from 2**k to 2**(k + 1) - 1.
STEEP = {"co": 0.8, "tool": 0.97, "person": 0.95, "last": 0.95, "coined": 1.05, "rare": 1.15}
OCTAVES = 15  # the number of octaves, so the highest rank is 2**OCTAVES - 1
TITLE_CASE = 0.34  # the fraction of titles in which most words are capitalized
COLON_CASE = 0.75  # the fraction of titles that have a capital letter after a colon
CURLY = 0.3  # the fraction of titles that use ’ instead of '
# The limit on the pieces of a title is MIN_PIECES plus a random fraction of EXTRA_PIECES. A title with more
# pieces than this limit gets no further phrase.
MIN_PIECES = 8
EXTRA_PIECES = 4
LONGEST = 80  # the maximum number of characters of a title, as on the real news page

TABLES = dict(re.findall(r"^(\w+): (.*(?:\n  .*)*)", WORDS + RULES, re.M))
LISTS = {name: body.split() for name, body in TABLES.items() if f"\n{name}: " in WORDS}
TOPIC_LISTS = [[part.split() for part in topic.split(";")] for topic in re.split(r"\n(?! )", TOPICS.strip())]
PAST = dict(pair.split(":") for pair in LISTS["ed"])
PLURAL = dict(pair.split(":") for pair in LISTS["plurals"])
SMALL = frozenset(LISTS["small"])
FORMS = {  # maps the name of a slot in a pattern to (kind of word, ending)
    "n": ("n", ""),
    "ns": ("n", "s"),
    "m": ("m", ""),
    "v": ("v", ""),
    "vs": ("v", "s"),
    "ved": ("v", "ed"),
    "ving": ("v", "ing"),
    "adj": ("a", ""),
}
AN = re.compile(r"\ba(?= [“‘\"']?(?:[aeio]|u(?!ni|s|r[aeiou])))", re.I)
# Words whose last letter is doubled before an ending, such as "stop" in "stopped".
DOUBLED = re.compile(r"^[^aeiou]*[aeiou][bdgmnprtz]$|^de[bf]ug$")


@cache
def inflect(word: str, ending: str) -> str:
    """Return a word with the ending "s", "ed", "ing" or "", following the rules of English spelling."""
    consonant_y = word[-1] == "y" and word[-2:-1] not in tuple("aeiou")
    if ending == "s":
        if word in PLURAL or consonant_y:
            return PLURAL.get(word, word[:-1] + "ies")
        needs_e = word.endswith(("s", "x", "z", "ch", "sh")) or word in ("go", "veto")
        return word + ("es" if needs_e else "s")
    if ending == "ed" and (word in PAST or consonant_y):
        return PAST.get(word, word[:-1] + "ied")
    if ending and word[-1] == "e" and not (ending == "ing" and word.endswith(("ee", "oe", "ie"))):
        return word[:-1] + ending
    if ending and DOUBLED.search(word):
        return word + word[-1] + ending
    return word + ending


def zipf(words: Sequence[Any], share: float = 1.0) -> list[float]:
    """Return a weight for each word, which decreases with the word's rank. The weights sum to `share`."""
    weights = [1 / (rank + SHIFT) for rank in range(len(words))]
    return [share * w / fsum(weights) for w in weights]


def lookup_table(items: Sequence[Any], weights: Sequence[float]) -> list[Any]:
    """Return a list of 2048 entries in which the number of copies of an item is proportional to its weight.

    A random choice from this list therefore selects an item with a probability proportional to its weight.
    """
    scale = 2048 / fsum(weights)
    end = 0.0
    places: list[Any] = []
    for item, weight in zip(items, weights, strict=True):
        end += weight * scale
        places += [item] * (round(end) - len(places))
    return places


# -- names and rare words, which are determined by their kind, topic and rank


def chooser(key: str) -> Callable[[Any], Any]:
    """Return a function that chooses an item from a sequence. A hash of the key determines the choices."""
    bits = int.from_bytes(hashlib.blake2b(key.encode()).digest(), "little")

    def choose(items: Any) -> Any:
        nonlocal bits
        bits, i = divmod(bits, len(items))
        return items[i]

    return choose


def syllables(choose: Callable[[Any], Any]) -> tuple[str, str]:
    """Return a random syllable, and a word of two syllables that ends with this syllable."""
    one = "".join(choose(LISTS[part]) for part in ("onset", "vowel", "coda"))
    return one, choose(LISTS["onset"]) + choose(LISTS["vowel"]) + one


@cache
def rare(kind: str, rank: int) -> str:
    """Return the rare word of a given kind and rank."""
    choose = chooser(f"{kind} {rank}")
    one, two = syllables(choose)
    stem = choose([one, one, one, two, choose(LISTS["root"]), choose(LISTS["prefix"]) + one])
    return stem + choose(choose([LISTS[f"end_{kind}"], [""]]))


@cache
def name(kind: str, topic: int, rank: int) -> str:
    """Return a name of the given kind: a company, a tool, a person, a last name or a coined acronym."""
    choose = chooser(f"{kind} {topic} {rank}")
    if kind == "coined":
        return "".join(choose("SACPDTMIRLBFEGNVOHUWXKQ") for _ in range(2 + rank % 3))
    one, two = syllables(choose)
    root_vowel = choose(LISTS["root"]) + choose(LISTS["vowel"])
    stem = choose([one, one, two, root_vowel, choose(LISTS["root"]) + one])
    if kind == "last":
        return (stem + choose(["", "", *LISTS["end_last"]])).capitalize()
    if kind == "person":
        return f"{choose(LISTS['first'])} {name('last', topic, rank)}"
    noun = choose(TOPIC_LISTS[topic][0]).partition("-")[0]
    end = choose(TOPIC_LISTS[topic][4])
    if kind == "co":
        return choose([stem, stem, noun, stem + end, f"{stem} {end}"]).title()
    forms = [
        stem.capitalize(),
        stem,
        stem.capitalize() + end.capitalize(),
        end + stem,
        noun.capitalize() + end.capitalize(),
        noun.capitalize(),
        f"{stem}-{end}",
        f"{stem.capitalize()}.js",
        f"{stem}.io",
    ]
    return choose(forms)


# -- titles


class Writer:
    """Generates one title after another from a stream of random numbers."""

    def __init__(self) -> None:
        self.next = uniforms().__next__
        self.out: list[str] = []  # the pieces of the title that is being generated
        self.topic = 0
        self.last = ""  # the preceding word, which determines the favorites
        self.enough = 0.0  # a title with more pieces than this number gets no further phrase
        self.topic_words: dict[tuple[int, str], list[str]] = {}  # maps (topic, kind) to words
        self.words: dict[tuple[int, str], list[str]] = {}  # maps (topic, kind) to a lookup table of words
        self._make_word_tables()
        self.topics = lookup_table(range(len(TOPIC_LISTS)), zipf(TOPIC_LISTS))
        self.octaves: dict[str, list[int]] = {}
        for kind, steep in STEEP.items():
            self.octaves[kind] = lookup_table(range(OCTAVES), list(accumulate([steep] * OCTAVES, mul)))
        self.rules: dict[str, list[Any]] = {rule: [] for rule in TABLES}
        self.more = self.rules["more"]
        self._make_rule_tables()

    def _make_word_tables(self) -> None:
        for topic, lists in enumerate(TOPIC_LISTS):
            for kind, words, others in zip("nmva", lists, GENERAL.split(";"), strict=False):
                topic_words = words
                if kind in "nm":
                    topic_words = [word.replace("-", " ") for word in words]
                general = others.split()
                weights = zipf(topic_words, 1 - GENERAL_SHARE) + zipf(general, GENERAL_SHARE)
                self.topic_words[topic, kind] = topic_words
                self.words[topic, kind] = lookup_table(topic_words + general, weights)

    def _make_rule_tables(self) -> None:
        """Fill the lists of `rules` in place, because parsed patterns contain references to these lists."""
        for rule, body in TABLES.items():
            if rule in LISTS:
                self.rules[rule] += lookup_table([[word] for word in LISTS[rule]], zipf(LISTS[rule]))
                continue
            patterns = []
            weights = []
            for alternative in " ".join(body.split()).split(" | "):
                weight, pattern = alternative.split(" ", 1)
                patterns.append(self.parse(pattern))
                weights.append(float(weight))
            self.rules[rule] += lookup_table(patterns, weights)

    def parse(self, pattern: str) -> list[Any]:
        """Split a pattern into parts.

        Literal text becomes a string. The name of a rule or a list becomes the lookup table of the rule or
        the list. An inflected word becomes a tuple (kind, ending), and a name becomes a tuple (kind,).
        """
        parts: list[Any] = []
        for i, text in enumerate(re.split(r"\{(\w+)\}", pattern.replace("_", " "))):
            is_slot = i % 2 == 1
            if is_slot and text in self.rules:
                parts.append(self.rules[text])
            elif is_slot:
                parts.append(FORMS.get(text, (text,)))
            elif text:
                parts.append(text)
        return parts

    def draw(self, items: Sequence[Any]) -> Any:
        return items[int(self.next() * len(items))]

    def rank(self, kind: str) -> int:
        """Draw an octave of ranks, and then draw a rank in this octave."""
        first = 1 << self.draw(self.octaves[kind])
        return first + int(self.next() * first)

    def word(self, kind: str) -> str:
        """Draw a rare word, a favorite of the preceding word, or any word of the topic."""
        x = self.next() - RARE[kind]
        if x < 0:
            self.last = rare(kind, self.rank("rare"))
        elif x < FAVOURED and self.last:
            words = self.topic_words[self.topic, kind]
            favourite = zlib.crc32(self.last.encode()) + int(self.next() * self.next() * 8)
            self.last = words[favourite % len(words)]
        else:
            self.last = self.draw(self.words[self.topic, kind])
        return self.last

    def expand(self, rule: list[Any]) -> None:
        """Draw one of a rule's patterns, and append the pieces of this pattern to `out`."""
        out = self.out
        if rule is self.more and len(out) > self.enough:
            return
        for part in rule[int(self.next() * len(rule))]:
            if part.__class__ is str:
                out.append(part)
            elif part.__class__ is list:
                self.expand(part)
            elif part[0] in KNOWN:
                topic = 0 if self.next() < KNOWN[part[0]] else self.topic
                self.last = name(part[0], topic, self.rank(part[0]))
                out.append(self.last)
            else:
                out.append(inflect(self.word(part[0]), part[1]))

    def title(self) -> str:
        """Generate and return the next title."""
        self.out = []
        self.last = ""
        self.topic = self.draw(self.topics)
        self.enough = MIN_PIECES + EXTRA_PIECES * self.next()
        self.expand(self.rules["title"])
        text = AN.sub("an", "".join(self.out))
        title_case = self.next() < TITLE_CASE
        colon_case = self.next() < COLON_CASE
        if self.next() < CURLY:
            text = text.replace("'", "’")
        words = text.split(" ")
        capital = True  # True if the next word starts with a capital letter
        for i, word in enumerate(words):
            if capital or (title_case and word not in SMALL):
                start = word[0] in "“‘\"'("
                if word[start:].islower():  # names and acronyms keep their case
                    words[i] = word[:start] + word[start:].capitalize()
            capital = colon_case and word[-1] == ":"
        return " ".join(words).replace("~", " ")


def uniforms() -> Iterator[float]:
    """Yield an endless sequence of random floats in [0, 1), with 53 random bits each."""
    bits = np.random.PCG64(SEED)
    while True:
        yield from ((bits.random_raw(65_536) >> 11) * 2.0**-53).tolist()


def titles(n: int) -> list[str]:
    """Return the first n distinct titles of the grammar."""
    writer = Writer()
    distinct: dict[str, None] = {}
    while len(distinct) < n:
        title = writer.title()
        if len(title) <= LONGEST:
            distinct[title] = None
    return list(distinct)
